//! What `KVM_CHECK_EXTENSION` answers.

use kvm_bindings as kb;

use super::Status::{self, Absent, As, Full, Partial};

/// The answer to `KVM_CHECK_EXTENSION`.
#[derive(Clone, Copy)]
pub enum Value {
    /// Always this number.
    Fixed(i32),
    /// Depends on the host.
    Host(fn() -> i32),
}

/// One row: a capability.
pub struct Capability {
    /// Its name in `linux/kvm.h`.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
    /// The answer.
    pub value: Value,
    /// How much of it is there.
    pub status: Status,
}

/// Longest table of GSI routes.
pub(crate) const MAX_IRQ_ROUTES: i32 = 4096;
/// Most vCPUs of one VM.
pub(crate) const MAX_VCPUS: u32 = 1024;
/// vCPU ids are below this.
pub(crate) const MAX_VCPU_IDS: u32 = 4 * MAX_VCPUS;
/// Memory slots that a program may use: those of a 16-bit signed id, without three that the kernel
/// keeps for itself.
pub(crate) const USER_MEM_SLOTS: u32 = 32767 - 3;
/// Machine-check banks.
pub(crate) const MAX_MCE_BANKS: u32 = 32;
/// Flags of `KVM_SET_GUEST_DEBUG` that are known.
pub(crate) const GUESTDBG_VALID_MASK: u32 = kb::KVM_GUESTDBG_ENABLE
    | kb::KVM_GUESTDBG_SINGLESTEP
    | kb::KVM_GUESTDBG_USE_HW_BP
    | kb::KVM_GUESTDBG_USE_SW_BP
    | kb::KVM_GUESTDBG_INJECT_BP
    | kb::KVM_GUESTDBG_INJECT_DB
    | kb::KVM_GUESTDBG_BLOCKIRQ;
/// Quirks that `KVM_CAP_DISABLE_QUIRKS2` may turn off.
pub(crate) const QUIRKS: u32 = kb::KVM_X86_QUIRK_LINT0_REENABLED
    | kb::KVM_X86_QUIRK_CD_NW_CLEARED
    | kb::KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | kb::KVM_X86_QUIRK_OUT_7E_INC_RIP
    | kb::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | kb::KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | kb::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
    | kb::KVM_X86_QUIRK_SLOT_ZAP_ALL
    | kb::KVM_X86_QUIRK_STUFF_FEATURE_MSRS;
/// `KVM_HC_MAP_GPA_RANGE`.
const HC_MAP_GPA_RANGE: u32 = 12;
/// Hypercalls that `KVM_CAP_EXIT_HYPERCALL` may hand to the monitor: a bit for each number.
pub(crate) const EXIT_HYPERCALLS: u32 = 1 << HC_MAP_GPA_RANGE;
/// Exits that `KVM_CAP_X86_DISABLE_EXITS` may turn off.
pub(crate) const DISABLE_EXITS: u32 = kb::KVM_X86_DISABLE_EXITS_HLT
    | kb::KVM_X86_DISABLE_EXITS_PAUSE
    | kb::KVM_X86_DISABLE_EXITS_CSTATE;
/// Flags of `KVM_CAP_X2APIC_API`.
pub(crate) const X2APIC_API: u32 =
    kb::KVM_X2APIC_API_USE_32BIT_IDS | kb::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
/// Register sets that `kvm_run` can carry.
pub(crate) const SYNC_REGS: u32 =
    kb::KVM_SYNC_X86_REGS | kb::KVM_SYNC_X86_SREGS | kb::KVM_SYNC_X86_EVENTS;
/// Flags of `KVM_GET_CLOCK`.
pub(crate) const CLOCK_FLAGS: u32 =
    kb::KVM_CLOCK_TSC_STABLE | kb::KVM_CLOCK_REALTIME | kb::KVM_CLOCK_HOST_TSC;
/// Flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
pub(crate) const DIRTY_LOG_MANUAL: u32 =
    kb::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kb::KVM_DIRTY_LOG_INITIALLY_SET;
/// Bytes of a dirty ring at most.
const DIRTY_RING_MAX: u32 = 65536 * size_of::<kb::kvm_dirty_gfn>() as u32;

macro_rules! caps {
    ($($name:ident = $value:expr, $status:expr;)*) => {
        /// Every capability, by number.
        pub static CAPABILITIES: &[Capability] = &[
            $(Capability {
                name: stringify!($name),
                number: kb::$name,
                value: $value,
                status: $status,
            },)*
        ];
    };
}

const YES: Value = Value::Fixed(1);
const NO: Value = Value::Fixed(0);
const XEN: Status = Absent("no Xen guests");
const HYPERV: Status = Absent("no Hyper-V enlightenments");
const REMOVED: Status = Absent("removed from the kernel long ago");

const fn mask(bits: u32) -> Value {
    Value::Fixed(bits as i32)
}

caps! {
    KVM_CAP_IRQCHIP = YES, Full;
    KVM_CAP_HLT = YES, Full;
    KVM_CAP_MMU_SHADOW_CACHE_CONTROL = YES, Full;
    KVM_CAP_USER_MEMORY = YES, Full;
    KVM_CAP_SET_TSS_ADDR = YES, Full;
    KVM_CAP_VAPIC = YES, Full;
    KVM_CAP_EXT_CPUID = YES, Full;
    KVM_CAP_CLOCKSOURCE = YES, Full;
    KVM_CAP_NR_VCPUS = Value::Host(online_cpus), Full;
    KVM_CAP_NR_MEMSLOTS = mask(USER_MEM_SLOTS), Full;
    KVM_CAP_PIT = YES, Full;
    KVM_CAP_NOP_IO_DELAY = YES, Full;
    KVM_CAP_PV_MMU = NO, REMOVED;
    KVM_CAP_MP_STATE = YES, Full;
    KVM_CAP_COALESCED_MMIO = mask(kb::KVM_COALESCED_MMIO_PAGE_OFFSET), Full;
    KVM_CAP_SYNC_MMU = YES, Full;
    KVM_CAP_IOMMU = NO, REMOVED;
    KVM_CAP_DESTROY_MEMORY_REGION_WORKS = YES, Full;
    KVM_CAP_USER_NMI = YES, Full;
    KVM_CAP_SET_GUEST_DEBUG = YES, Full;
    KVM_CAP_REINJECT_CONTROL = YES, Full;
    KVM_CAP_IRQ_ROUTING = Value::Fixed(MAX_IRQ_ROUTES), Full;
    KVM_CAP_IRQ_INJECT_STATUS = YES, Full;
    KVM_CAP_ASSIGN_DEV_IRQ = NO, REMOVED;
    KVM_CAP_JOIN_MEMORY_REGIONS_WORKS = YES, Full;
    KVM_CAP_MCE = mask(MAX_MCE_BANKS), Full;
    KVM_CAP_IRQFD = YES, Full;
    KVM_CAP_PIT2 = YES, Full;
    KVM_CAP_SET_BOOT_CPU_ID = YES, Full;
    KVM_CAP_PIT_STATE2 = YES, Full;
    KVM_CAP_IOEVENTFD = YES, Full;
    KVM_CAP_SET_IDENTITY_MAP_ADDR = YES, Full;
    KVM_CAP_XEN_HVM = NO, XEN;
    KVM_CAP_ADJUST_CLOCK = mask(CLOCK_FLAGS), Full;
    KVM_CAP_INTERNAL_ERROR_DATA = YES, Full;
    KVM_CAP_VCPU_EVENTS = YES, Full;
    KVM_CAP_HYPERV = NO, HYPERV;
    KVM_CAP_HYPERV_VAPIC = NO, HYPERV;
    KVM_CAP_HYPERV_SPIN = NO, HYPERV;
    KVM_CAP_PCI_SEGMENT = NO, Absent("announces device assignment, which was removed");
    KVM_CAP_INTR_SHADOW = NO, Absent("the kernel answers 0 too; KVM_CAP_VCPU_EVENTS carries it");
    KVM_CAP_DEBUGREGS = YES, Full;
    KVM_CAP_X86_ROBUST_SINGLESTEP = YES, Full;
    KVM_CAP_ENABLE_CAP = YES, Full;
    KVM_CAP_XSAVE = YES, Full;
    KVM_CAP_XCRS = YES, Full;
    KVM_CAP_ASYNC_PF = YES, As("as where no guest page is ever swapped out: a vCPU waits for the host, and no page is announced");
    KVM_CAP_TSC_CONTROL = YES, Full;
    KVM_CAP_GET_TSC_KHZ = YES, Full;
    KVM_CAP_MAX_VCPUS = mask(MAX_VCPUS), Full;
    KVM_CAP_TSC_DEADLINE_TIMER = YES, Full;
    KVM_CAP_SYNC_REGS = mask(SYNC_REGS), Full;
    KVM_CAP_PCI_2_3 = NO, REMOVED;
    KVM_CAP_KVMCLOCK_CTRL = YES, Full;
    KVM_CAP_SIGNAL_MSI = YES, Full;
    KVM_CAP_READONLY_MEM = YES, Full;
    KVM_CAP_IRQFD_RESAMPLE = YES, Full;
    KVM_CAP_DEVICE_CTRL = YES, Full;
    KVM_CAP_EXT_EMUL_CPUID = YES, Full;
    KVM_CAP_HYPERV_TIME = NO, HYPERV;
    KVM_CAP_IOAPIC_POLARITY_IGNORED = YES, Full;
    KVM_CAP_ENABLE_CAP_VM = YES, Full;
    KVM_CAP_IOEVENTFD_NO_LENGTH = YES, Full;
    KVM_CAP_VM_ATTRIBUTES = NO, Absent("the kernel has none on x86 either");
    KVM_CAP_CHECK_EXTENSION_VM = YES, Full;
    KVM_CAP_DISABLE_QUIRKS = YES, Full;
    KVM_CAP_X86_SMM = NO, Absent("no system management mode");
    KVM_CAP_MULTI_ADDRESS_SPACE = NO, Absent("the second address space is system management mode's");
    KVM_CAP_GUEST_DEBUG_HW_BPS = NO, Absent("the kernel answers 0 on x86 too");
    KVM_CAP_GUEST_DEBUG_HW_WPS = NO, Absent("the kernel answers 0 on x86 too");
    KVM_CAP_SPLIT_IRQCHIP = YES, Full;
    KVM_CAP_IOEVENTFD_ANY_LENGTH = YES, Full;
    KVM_CAP_HYPERV_SYNIC = NO, HYPERV;
    KVM_CAP_VCPU_ATTRIBUTES = YES, Full;
    KVM_CAP_MAX_VCPU_ID = mask(MAX_VCPU_IDS), Full;
    KVM_CAP_X2APIC_API = mask(X2APIC_API), Full;
    KVM_CAP_IMMEDIATE_EXIT = YES, Full;
    KVM_CAP_X86_DISABLE_EXITS = mask(DISABLE_EXITS), Full;
    KVM_CAP_HYPERV_SYNIC2 = NO, HYPERV;
    KVM_CAP_HYPERV_VP_INDEX = NO, HYPERV;
    KVM_CAP_GET_MSR_FEATURES = YES, Full;
    KVM_CAP_HYPERV_EVENTFD = NO, HYPERV;
    KVM_CAP_HYPERV_TLBFLUSH = NO, HYPERV;
    KVM_CAP_NESTED_STATE = Value::Host(crate::vcpu::largest_nested_state), As("as with the module's parameter nested=0: the CPU has neither VMX nor SVM");
    KVM_CAP_MSR_PLATFORM_INFO = YES, Full;
    KVM_CAP_HYPERV_SEND_IPI = NO, HYPERV;
    KVM_CAP_COALESCED_PIO = YES, Full;
    KVM_CAP_HYPERV_ENLIGHTENED_VMCS = NO, HYPERV;
    KVM_CAP_EXCEPTION_PAYLOAD = YES, Full;
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT = NO, Absent("the kernel answers 0 too; see PROTECT2");
    KVM_CAP_HYPERV_CPUID = NO, HYPERV;
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = mask(DIRTY_LOG_MANUAL), Full;
    KVM_CAP_PMU_EVENT_FILTER = NO, Absent("no PMU");
    KVM_CAP_HYPERV_DIRECT_TLBFLUSH = NO, HYPERV;
    KVM_CAP_HALT_POLL = YES, As("as with the module's parameter halt_poll_ns=0: without the capability nothing is polled");
    KVM_CAP_ASYNC_PF_INT = YES, As("see KVM_CAP_ASYNC_PF");
    KVM_CAP_LAST_CPU = YES, Full;
    KVM_CAP_SMALLER_MAXPHYADDR = NO, Absent("as kvm_amd's: 1 with shadow paging alone; but addresses beyond the guest's width fault on every path");
    KVM_CAP_STEAL_TIME = YES, Full;
    KVM_CAP_X86_USER_SPACE_MSR = YES, Full;
    KVM_CAP_X86_MSR_FILTER = YES, Full;
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID = YES, Full;
    KVM_CAP_SYS_HYPERV_CPUID = NO, HYPERV;
    KVM_CAP_DIRTY_LOG_RING = mask(DIRTY_RING_MAX), Full;
    KVM_CAP_X86_BUS_LOCK_EXIT = NO, Absent("split locks run on the host CPU unseen");
    KVM_CAP_SET_GUEST_DEBUG2 = mask(GUESTDBG_VALID_MASK), Full;
    KVM_CAP_SGX_ATTRIBUTE = NO, Absent("no SGX");
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM = NO, Absent("no memory encryption");
    KVM_CAP_HYPERV_ENFORCE_CPUID = NO, HYPERV;
    KVM_CAP_SREGS2 = YES, Full;
    KVM_CAP_EXIT_HYPERCALL = mask(EXIT_HYPERCALLS), Full;
    KVM_CAP_BINARY_STATS_FD = YES, Full;
    KVM_CAP_EXIT_ON_EMULATION_FAILURE = YES, Full;
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM = NO, Absent("no memory encryption");
    KVM_CAP_VM_GPA_BITS = NO, Absent("the kernel answers 0 on x86 too");
    KVM_CAP_XSAVE2 = mask(size_of::<kb::kvm_xsave>() as u32), Full;
    KVM_CAP_SYS_ATTRIBUTES = YES, Full;
    KVM_CAP_PMU_CAPABILITY = NO, Absent("no PMU");
    KVM_CAP_DISABLE_QUIRKS2 = mask(QUIRKS), Full;
    KVM_CAP_VM_TSC_CONTROL = YES, Full;
    KVM_CAP_SYSTEM_EVENT_DATA = YES, Full;
    KVM_CAP_X86_TRIPLE_FAULT_EVENT = YES, Full;
    KVM_CAP_X86_NOTIFY_VMEXIT = NO, Absent("no such hardware exit");
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES = NO, Absent("works round a fault of hardware that is not used");
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL = mask(DIRTY_RING_MAX), Full;
    KVM_CAP_PMU_EVENT_MASKED_EVENTS = NO, Absent("no PMU");
    KVM_CAP_USER_MEMORY2 = YES, Full;
    KVM_CAP_MEMORY_FAULT_INFO = YES, Full;
    KVM_CAP_MEMORY_ATTRIBUTES = mask(kb::KVM_MEMORY_ATTRIBUTE_PRIVATE), Partial("dirty rings name pieces of a slot that private frames cut");
    KVM_CAP_GUEST_MEMFD = YES, Partial("read, write and mmap are refused with EBADF, EPERM and ENODEV");
    KVM_CAP_VM_TYPES = mask(1 << kb::KVM_X86_DEFAULT_VM | 1 << kb::KVM_X86_SW_PROTECTED_VM), Full;
    KVM_CAP_PRE_FAULT_MEMORY = YES, Full;
    KVM_CAP_X86_APIC_BUS_CYCLES_NS = YES, Full;
    KVM_CAP_X86_GUEST_MODE = YES, Full;
}

fn online_cpus() -> i32 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    i32::try_from(cpus)
        .unwrap_or(i32::MAX)
        .min(MAX_VCPUS as i32)
}

/// `KVM_CHECK_EXTENSION`: 0 for a number that nobody knows.
pub fn capability(number: u64) -> i32 {
    let row = CAPABILITIES.iter().find(|c| u64::from(c.number) == number);
    match row.map(|row| row.value) {
        Some(Value::Fixed(value)) => value,
        Some(Value::Host(value)) => value(),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_honest() {
        assert!(CAPABILITIES.is_sorted_by(|a, b| a.number < b.number));
        for row in CAPABILITIES {
            let absent = matches!(row.status, Absent(_));
            let zero = capability(u64::from(row.number)) == 0;
            assert_eq!(absent, zero, "{}", row.name);
        }
    }

    #[test]
    fn answers() {
        assert_eq!(capability(u64::from(kb::KVM_CAP_NR_MEMSLOTS)), 32764);
        assert_eq!(capability(u64::from(kb::KVM_CAP_XSAVE2)), 4096);
        assert_eq!(capability(1 << 40), 0);
    }
}
