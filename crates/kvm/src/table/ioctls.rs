//! The rows: every ioctl of KVM on x86.

use kvm_bindings as kb;

use super::Handler::{Device, None, System, Vcpu, Vm};
use super::Status::{Absent, As, Full};
use super::number::{io, ior, iow, iowr};
use super::{Handler, Ioctl, Level, Status};
use crate::raw::{device, system, vcpu, vm, vm_irq};

const NESTED: Status =
    As("as with the module's parameter nested=0: the CPU has neither VMX nor SVM");
const XEN: Status = Absent("no Xen guests");
const HYPERV: Status = Absent("no Hyper-V enlightenments");
const ENCRYPTED: Status = Absent("no memory encryption");
const COUNTERS: Status = As("a memfd: values are those of the last exit, or at most 100 ms old");
const REMOVED: Status = Absent("removed from the kernel long ago");

/// Prefixes of ioctls and capabilities in `linux/kvm.h` that belong to other architectures.
pub const FOREIGN_PREFIXES: &[&str] = &[
    "KVM_ARM_",
    "KVM_PPC_",
    "KVM_S390_",
    "KVM_CAP_ARM_",
    "KVM_CAP_LOONGARCH_",
    "KVM_CAP_MIPS_",
    "KVM_CAP_PPC_",
    "KVM_CAP_RISCV_",
    "KVM_CAP_S390_",
    "KVM_CAP_SPAPR_",
];

/// Names in `linux/kvm.h` without such a prefix that belong to other architectures all the same.
const FOREIGN_NAMES: &[&str] = &[
    "KVM_ALLOCATE_RMA",
    "KVM_CREATE_SPAPR_TCE",
    "KVM_CREATE_SPAPR_TCE_64",
    "KVM_DIRTY_TLB",
    "KVM_GET_ONE_REG",
    "KVM_GET_REG_LIST",
    "KVM_SET_ONE_REG",
    "KVM_CAP_COUNTER_OFFSET",
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP",
    "KVM_CAP_IRQ_MPIC",
    "KVM_CAP_IRQ_XICS",
    "KVM_CAP_MSI_DEVID",
    "KVM_CAP_ONE_REG",
    "KVM_CAP_PTP_KVM",
    "KVM_CAP_SW_TLB",
];

/// Whether a name of `linux/kvm.h` belongs to another architecture.
pub fn foreign(name: &str) -> bool {
    FOREIGN_NAMES.contains(&name) || FOREIGN_PREFIXES.iter().any(|p| name.starts_with(p))
}

/// A row whose argument is a number, or which takes none.
const fn number(
    name: &'static str,
    request: u32,
    capability: &'static str,
    status: Status,
    handler: Handler,
) -> Ioctl {
    Ioctl {
        name,
        request,
        structure: "",
        capability,
        status,
        handler,
    }
}

macro_rules! row {
    ($name:literal, $direction:ident($nr:literal, $structure:ident), $cap:literal, $status:expr, $handler:expr) => {
        Ioctl {
            name: $name,
            request: $direction::<kb::$structure>($nr),
            structure: stringify!($structure),
            capability: $cap,
            status: $status,
            handler: $handler,
        }
    };
}

/// A row that points to one integer.
const fn integer(
    name: &'static str,
    request: u32,
    structure: &'static str,
    capability: &'static str,
    status: Status,
    handler: Handler,
) -> Ioctl {
    Ioctl {
        name,
        request,
        structure,
        capability,
        status,
        handler,
    }
}

/// Every ioctl, by level and number.
#[rustfmt::skip]
pub static IOCTLS: &[Ioctl] = &[
    // /dev/kvm
    number("KVM_GET_API_VERSION", io(0x00), "", Full, System(system::get_api_version)),
    number("KVM_CREATE_VM", io(0x01), "", Full, System(system::create_vm)),
    row!("KVM_GET_MSR_INDEX_LIST", iowr(0x02, kvm_msr_list), "", Full, System(system::get_msr_index_list)),
    number("KVM_CHECK_EXTENSION", io(0x03), "", Full, System(system::check_extension)),
    number("KVM_GET_VCPU_MMAP_SIZE", io(0x04), "", Full, System(system::get_vcpu_mmap_size)),
    row!("KVM_GET_SUPPORTED_CPUID", iowr(0x05, kvm_cpuid2), "KVM_CAP_EXT_CPUID", Full, System(system::get_supported_cpuid)),
    number("__KVM_DEPRECATED_MAIN_0x07", io(0x07), "", REMOVED, None(Level::System)),
    number("__KVM_DEPRECATED_MAIN_0x08", io(0x08), "", REMOVED, None(Level::System)),
    row!("KVM_GET_EMULATED_CPUID", iowr(0x09, kvm_cpuid2), "KVM_CAP_EXT_EMUL_CPUID", Full, System(system::get_emulated_cpuid)),
    row!("KVM_GET_MSR_FEATURE_INDEX_LIST", iowr(0x0a, kvm_msr_list), "KVM_CAP_GET_MSR_FEATURES", Full, System(system::get_msr_feature_index_list)),
    row!("KVM_GET_MSRS", iowr(0x88, kvm_msrs), "KVM_CAP_GET_MSR_FEATURES", Full, System(system::get_msrs)),
    integer("KVM_X86_GET_MCE_CAP_SUPPORTED", ior::<u64>(0x9d), "__u64", "KVM_CAP_MCE", Full, System(system::get_mce_cap_supported)),
    row!("KVM_GET_SUPPORTED_HV_CPUID", iowr(0xc1, kvm_cpuid2), "KVM_CAP_SYS_HYPERV_CPUID", HYPERV, None(Level::System)),
    row!("KVM_GET_DEVICE_ATTR", iow(0xe2, kvm_device_attr), "KVM_CAP_SYS_ATTRIBUTES", Full, System(system::get_device_attr)),
    row!("KVM_HAS_DEVICE_ATTR", iow(0xe3, kvm_device_attr), "KVM_CAP_SYS_ATTRIBUTES", Full, System(system::has_device_attr)),

    // A VM: memory
    integer("KVM_SET_MEMORY_REGION", iow::<[u8; 24]>(0x40), "kvm_memory_region", "", REMOVED, None(Level::Vm)),
    row!("KVM_GET_DIRTY_LOG", iow(0x42, kvm_dirty_log), "", Full, Vm(vm::get_dirty_log)),
    integer("KVM_SET_MEMORY_ALIAS", iow::<[u8; 32]>(0x43), "kvm_memory_alias", "", REMOVED, None(Level::Vm)),
    number("KVM_SET_NR_MMU_PAGES", io(0x44), "KVM_CAP_MMU_SHADOW_CACHE_CONTROL", Full, Vm(vm::set_nr_mmu_pages)),
    number("KVM_GET_NR_MMU_PAGES", io(0x45), "KVM_CAP_MMU_SHADOW_CACHE_CONTROL", REMOVED, None(Level::Vm)),
    row!("KVM_SET_USER_MEMORY_REGION", iow(0x46, kvm_userspace_memory_region), "KVM_CAP_USER_MEMORY", Full, Vm(vm::set_user_memory_region)),
    number("KVM_SET_TSS_ADDR", io(0x47), "KVM_CAP_SET_TSS_ADDR", Full, Vm(vm::set_tss_addr)),
    integer("KVM_SET_IDENTITY_MAP_ADDR", iow::<u64>(0x48), "__u64", "KVM_CAP_SET_IDENTITY_MAP_ADDR", Full, Vm(vm::set_identity_map_addr)),
    row!("KVM_SET_USER_MEMORY_REGION2", iow(0x49, kvm_userspace_memory_region2), "KVM_CAP_USER_MEMORY2", Full, Vm(vm::set_user_memory_region2)),
    row!("KVM_CLEAR_DIRTY_LOG", iowr(0xc0, kvm_clear_dirty_log), "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", Full, Vm(vm::clear_dirty_log)),
    number("KVM_RESET_DIRTY_RINGS", io(0xc7), "KVM_CAP_DIRTY_LOG_RING", Full, Vm(vm::reset_dirty_rings)),
    row!("KVM_SET_MEMORY_ATTRIBUTES", iow(0xd2, kvm_memory_attributes), "KVM_CAP_MEMORY_ATTRIBUTES", Full, Vm(vm::set_memory_attributes)),
    row!("KVM_CREATE_GUEST_MEMFD", iowr(0xd4, kvm_create_guest_memfd), "KVM_CAP_GUEST_MEMFD", Full, Vm(vm::create_guest_memfd)),
    integer("KVM_MEMORY_ENCRYPT_OP", iowr::<u64>(0xba), "unsigned long", "", ENCRYPTED, None(Level::Vm)),
    row!("KVM_MEMORY_ENCRYPT_REG_REGION", ior(0xbb, kvm_enc_region), "", ENCRYPTED, None(Level::Vm)),
    row!("KVM_MEMORY_ENCRYPT_UNREG_REGION", ior(0xbc, kvm_enc_region), "", ENCRYPTED, None(Level::Vm)),

    // A VM: vCPUs, capabilities, clocks
    number("KVM_CREATE_VCPU", io(0x41), "", Full, Vm(vm::create_vcpu)),
    number("KVM_CHECK_EXTENSION", io(0x03), "KVM_CAP_CHECK_EXTENSION_VM", Full, Vm(vm::check_extension)),
    row!("KVM_ENABLE_CAP", iow(0xa3, kvm_enable_cap), "KVM_CAP_ENABLE_CAP_VM", Full, Vm(vm::enable_cap)),
    number("KVM_SET_BOOT_CPU_ID", io(0x78), "KVM_CAP_SET_BOOT_CPU_ID", Full, Vm(vm::set_boot_cpu_id)),
    row!("KVM_SET_CLOCK", iow(0x7b, kvm_clock_data), "KVM_CAP_ADJUST_CLOCK", Full, Vm(vm::set_clock)),
    row!("KVM_GET_CLOCK", ior(0x7c, kvm_clock_data), "KVM_CAP_ADJUST_CLOCK", Full, Vm(vm::get_clock)),
    number("KVM_SET_TSC_KHZ", io(0xa2), "KVM_CAP_VM_TSC_CONTROL", Full, Vm(vm::set_tsc_khz)),
    number("KVM_GET_TSC_KHZ", io(0xa3), "KVM_CAP_VM_TSC_CONTROL", Full, Vm(vm::get_tsc_khz)),
    row!("KVM_CREATE_DEVICE", iowr(0xe0, kvm_create_device), "KVM_CAP_DEVICE_CTRL", Full, Vm(vm::create_device)),
    row!("KVM_X86_SET_MSR_FILTER", iow(0xc6, kvm_msr_filter), "KVM_CAP_X86_MSR_FILTER", Full, Vm(vm::set_msr_filter)),
    number("KVM_GET_STATS_FD", io(0xce), "KVM_CAP_BINARY_STATS_FD", COUNTERS, Vm(vm::get_stats_fd)),
    row!("KVM_SET_PMU_EVENT_FILTER", iow(0xb2, kvm_pmu_event_filter), "KVM_CAP_PMU_EVENT_FILTER", Absent("no PMU"), None(Level::Vm)),

    // A VM: interrupt controllers and event descriptors
    number("KVM_CREATE_IRQCHIP", io(0x60), "KVM_CAP_IRQCHIP", Full, Vm(vm_irq::create_irqchip)),
    row!("KVM_IRQ_LINE", iow(0x61, kvm_irq_level), "KVM_CAP_IRQCHIP", Full, Vm(vm_irq::irq_line)),
    row!("KVM_GET_IRQCHIP", iowr(0x62, kvm_irqchip), "KVM_CAP_IRQCHIP", Full, Vm(vm_irq::get_irqchip)),
    row!("KVM_SET_IRQCHIP", ior(0x63, kvm_irqchip), "KVM_CAP_IRQCHIP", Full, Vm(vm_irq::set_irqchip)),
    number("KVM_CREATE_PIT", io(0x64), "KVM_CAP_PIT", Full, Vm(vm_irq::create_pit)),
    row!("KVM_GET_PIT", iowr(0x65, kvm_pit_state), "KVM_CAP_PIT", Full, Vm(vm_irq::get_pit)),
    row!("KVM_SET_PIT", ior(0x66, kvm_pit_state), "KVM_CAP_PIT", Full, Vm(vm_irq::set_pit)),
    row!("KVM_IRQ_LINE_STATUS", iowr(0x67, kvm_irq_level), "KVM_CAP_IRQ_INJECT_STATUS", Full, Vm(vm_irq::irq_line_status)),
    row!("KVM_REGISTER_COALESCED_MMIO", iow(0x67, kvm_coalesced_mmio_zone), "KVM_CAP_COALESCED_MMIO", Full, Vm(vm_irq::register_coalesced)),
    row!("KVM_UNREGISTER_COALESCED_MMIO", iow(0x68, kvm_coalesced_mmio_zone), "KVM_CAP_COALESCED_MMIO", Full, Vm(vm_irq::unregister_coalesced)),
    integer("KVM_ASSIGN_PCI_DEVICE", ior::<[u8; 64]>(0x69), "kvm_assigned_pci_dev", "KVM_CAP_IOMMU", REMOVED, None(Level::Vm)),
    row!("KVM_SET_GSI_ROUTING", iow(0x6a, kvm_irq_routing), "KVM_CAP_IRQ_ROUTING", Full, Vm(vm_irq::set_gsi_routing)),
    integer("__KVM_DEPRECATED_VM_R_0x70", ior::<[u8; 64]>(0x70), "kvm_assigned_irq", "", REMOVED, None(Level::Vm)),
    integer("KVM_ASSIGN_DEV_IRQ", iow::<[u8; 64]>(0x70), "kvm_assigned_irq", "KVM_CAP_ASSIGN_DEV_IRQ", REMOVED, None(Level::Vm)),
    number("KVM_REINJECT_CONTROL", io(0x71), "KVM_CAP_REINJECT_CONTROL", Full, Vm(vm_irq::reinject_control)),
    integer("KVM_DEASSIGN_PCI_DEVICE", iow::<[u8; 64]>(0x72), "kvm_assigned_pci_dev", "KVM_CAP_IOMMU", REMOVED, None(Level::Vm)),
    integer("KVM_ASSIGN_SET_MSIX_NR", iow::<[u8; 8]>(0x73), "kvm_assigned_msix_nr", "KVM_CAP_IOMMU", REMOVED, None(Level::Vm)),
    integer("KVM_ASSIGN_SET_MSIX_ENTRY", iow::<[u8; 16]>(0x74), "kvm_assigned_msix_entry", "KVM_CAP_IOMMU", REMOVED, None(Level::Vm)),
    integer("KVM_DEASSIGN_DEV_IRQ", iow::<[u8; 64]>(0x75), "kvm_assigned_irq", "KVM_CAP_ASSIGN_DEV_IRQ", REMOVED, None(Level::Vm)),
    integer("KVM_ASSIGN_SET_INTX_MASK", iow::<[u8; 64]>(0xa4), "kvm_assigned_pci_dev", "KVM_CAP_PCI_2_3", REMOVED, None(Level::Vm)),
    row!("KVM_IRQFD", iow(0x76, kvm_irqfd), "KVM_CAP_IRQFD", Full, Vm(vm_irq::irqfd)),
    row!("KVM_CREATE_PIT2", iow(0x77, kvm_pit_config), "KVM_CAP_PIT2", Full, Vm(vm_irq::create_pit2)),
    row!("KVM_IOEVENTFD", iow(0x79, kvm_ioeventfd), "KVM_CAP_IOEVENTFD", Full, Vm(vm_irq::ioeventfd)),
    row!("KVM_GET_PIT2", ior(0x9f, kvm_pit_state2), "KVM_CAP_PIT_STATE2", Full, Vm(vm_irq::get_pit2)),
    row!("KVM_SET_PIT2", iow(0xa0, kvm_pit_state2), "KVM_CAP_PIT_STATE2", Full, Vm(vm_irq::set_pit2)),
    row!("KVM_SIGNAL_MSI", iow(0xa5, kvm_msi), "KVM_CAP_SIGNAL_MSI", Full, Vm(vm_irq::signal_msi)),

    // A VM: other hypervisors' interfaces
    row!("KVM_XEN_HVM_CONFIG", iow(0x7a, kvm_xen_hvm_config), "KVM_CAP_XEN_HVM", XEN, None(Level::Vm)),
    row!("KVM_XEN_HVM_GET_ATTR", iowr(0xc8, kvm_xen_hvm_attr), "KVM_CAP_XEN_HVM", XEN, None(Level::Vm)),
    row!("KVM_XEN_HVM_SET_ATTR", iow(0xc9, kvm_xen_hvm_attr), "KVM_CAP_XEN_HVM", XEN, None(Level::Vm)),
    row!("KVM_XEN_HVM_EVTCHN_SEND", iow(0xd0, kvm_irq_routing_xen_evtchn), "KVM_CAP_XEN_HVM", XEN, None(Level::Vm)),
    row!("KVM_HYPERV_EVENTFD", iow(0xbd, kvm_hyperv_eventfd), "KVM_CAP_HYPERV_EVENTFD", HYPERV, None(Level::Vm)),

    // A vCPU: running
    number("KVM_RUN", io(0x80), "", Full, Vcpu(vcpu::run)),
    row!("KVM_SET_SIGNAL_MASK", iow(0x8b, kvm_signal_mask), "", Full, Vcpu(vcpu::set_signal_mask)),
    row!("KVM_INTERRUPT", iow(0x86, kvm_interrupt), "", Full, Vcpu(vcpu::interrupt)),
    number("KVM_NMI", io(0x9a), "KVM_CAP_USER_NMI", Full, Vcpu(vcpu::nmi)),
    number("KVM_SMI", io(0xb7), "KVM_CAP_X86_SMM", Absent("no system management mode; answers ENOTTY"), Vcpu(vcpu::smi)),
    row!("KVM_SET_GUEST_DEBUG", iow(0x9b, kvm_guest_debug), "KVM_CAP_SET_GUEST_DEBUG", Full, Vcpu(vcpu::set_guest_debug)),
    integer("__KVM_DEPRECATED_VCPU_W_0x87", iow::<[u8; 80]>(0x87), "kvm_debug_guest", "", REMOVED, None(Level::Vcpu)),
    row!("KVM_PRE_FAULT_MEMORY", iowr(0xd5, kvm_pre_fault_memory), "KVM_CAP_PRE_FAULT_MEMORY", Full, Vcpu(vcpu::pre_fault_memory)),
    row!("KVM_TRANSLATE", iowr(0x85, kvm_translation), "", Full, Vcpu(vcpu::translate)),
    number("KVM_GET_STATS_FD", io(0xce), "KVM_CAP_BINARY_STATS_FD", COUNTERS, Vcpu(vcpu::get_stats_fd)),

    // A vCPU: registers
    row!("KVM_GET_REGS", ior(0x81, kvm_regs), "", Full, Vcpu(vcpu::get_regs)),
    row!("KVM_SET_REGS", iow(0x82, kvm_regs), "", Full, Vcpu(vcpu::set_regs)),
    row!("KVM_GET_SREGS", ior(0x83, kvm_sregs), "", Full, Vcpu(vcpu::get_sregs)),
    row!("KVM_SET_SREGS", iow(0x84, kvm_sregs), "", Full, Vcpu(vcpu::set_sregs)),
    row!("KVM_GET_SREGS2", ior(0xcc, kvm_sregs2), "KVM_CAP_SREGS2", Full, Vcpu(vcpu::get_sregs2)),
    row!("KVM_SET_SREGS2", iow(0xcd, kvm_sregs2), "KVM_CAP_SREGS2", Full, Vcpu(vcpu::set_sregs2)),
    row!("KVM_GET_FPU", ior(0x8c, kvm_fpu), "", Full, Vcpu(vcpu::get_fpu)),
    row!("KVM_SET_FPU", iow(0x8d, kvm_fpu), "", Full, Vcpu(vcpu::set_fpu)),
    row!("KVM_GET_XSAVE", ior(0xa4, kvm_xsave), "KVM_CAP_XSAVE", Full, Vcpu(vcpu::get_xsave)),
    row!("KVM_SET_XSAVE", iow(0xa5, kvm_xsave), "KVM_CAP_XSAVE", Full, Vcpu(vcpu::set_xsave)),
    row!("KVM_GET_XSAVE2", ior(0xcf, kvm_xsave), "KVM_CAP_XSAVE2", Full, Vcpu(vcpu::get_xsave)),
    row!("KVM_GET_XCRS", ior(0xa6, kvm_xcrs), "KVM_CAP_XCRS", Full, Vcpu(vcpu::get_xcrs)),
    row!("KVM_SET_XCRS", iow(0xa7, kvm_xcrs), "KVM_CAP_XCRS", Full, Vcpu(vcpu::set_xcrs)),
    row!("KVM_GET_DEBUGREGS", ior(0xa1, kvm_debugregs), "KVM_CAP_DEBUGREGS", Full, Vcpu(vcpu::get_debugregs)),
    row!("KVM_SET_DEBUGREGS", iow(0xa2, kvm_debugregs), "KVM_CAP_DEBUGREGS", Full, Vcpu(vcpu::set_debugregs)),
    row!("KVM_GET_MSRS", iowr(0x88, kvm_msrs), "", Full, Vcpu(vcpu::get_msrs)),
    row!("KVM_SET_MSRS", iow(0x89, kvm_msrs), "", Full, Vcpu(vcpu::set_msrs)),
    row!("KVM_SET_CPUID", iow(0x8a, kvm_cpuid), "", Full, Vcpu(vcpu::set_cpuid)),
    row!("KVM_SET_CPUID2", iow(0x90, kvm_cpuid2), "KVM_CAP_EXT_CPUID", Full, Vcpu(vcpu::set_cpuid2)),
    row!("KVM_GET_CPUID2", iowr(0x91, kvm_cpuid2), "KVM_CAP_EXT_CPUID", Full, Vcpu(vcpu::get_cpuid2)),
    row!("KVM_GET_VCPU_EVENTS", ior(0x9f, kvm_vcpu_events), "KVM_CAP_VCPU_EVENTS", Full, Vcpu(vcpu::get_vcpu_events)),
    row!("KVM_SET_VCPU_EVENTS", iow(0xa0, kvm_vcpu_events), "KVM_CAP_VCPU_EVENTS", Full, Vcpu(vcpu::set_vcpu_events)),
    row!("KVM_GET_MP_STATE", ior(0x98, kvm_mp_state), "KVM_CAP_MP_STATE", Full, Vcpu(vcpu::get_mp_state)),
    row!("KVM_SET_MP_STATE", iow(0x99, kvm_mp_state), "KVM_CAP_MP_STATE", Full, Vcpu(vcpu::set_mp_state)),
    row!("KVM_GET_LAPIC", ior(0x8e, kvm_lapic_state), "KVM_CAP_IRQCHIP", Full, Vcpu(vcpu::get_lapic)),
    row!("KVM_SET_LAPIC", iow(0x8f, kvm_lapic_state), "KVM_CAP_IRQCHIP", Full, Vcpu(vcpu::set_lapic)),
    number("KVM_SET_TSC_KHZ", io(0xa2), "KVM_CAP_TSC_CONTROL", Full, Vcpu(vcpu::set_tsc_khz)),
    number("KVM_GET_TSC_KHZ", io(0xa3), "KVM_CAP_GET_TSC_KHZ", Full, Vcpu(vcpu::get_tsc_khz)),
    row!("KVM_GET_NESTED_STATE", iowr(0xbe, kvm_nested_state), "KVM_CAP_NESTED_STATE", NESTED, Vcpu(vcpu::get_nested_state)),
    row!("KVM_SET_NESTED_STATE", iow(0xbf, kvm_nested_state), "KVM_CAP_NESTED_STATE", NESTED, Vcpu(vcpu::set_nested_state)),

    // A vCPU: the rest
    row!("KVM_TPR_ACCESS_REPORTING", iowr(0x92, kvm_tpr_access_ctl), "KVM_CAP_VAPIC", Full, Vcpu(vcpu::tpr_access_reporting)),
    row!("KVM_SET_VAPIC_ADDR", iow(0x93, kvm_vapic_addr), "KVM_CAP_VAPIC", Full, Vcpu(vcpu::set_vapic_addr)),
    integer("KVM_X86_SETUP_MCE", iow::<u64>(0x9c), "__u64", "KVM_CAP_MCE", Full, Vcpu(vcpu::setup_mce)),
    row!("KVM_X86_SET_MCE", iow(0x9e, kvm_x86_mce), "KVM_CAP_MCE", Full, Vcpu(vcpu::set_mce)),
    row!("KVM_ENABLE_CAP", iow(0xa3, kvm_enable_cap), "KVM_CAP_ENABLE_CAP", Full, Vcpu(vcpu::enable_cap)),
    number("KVM_KVMCLOCK_CTRL", io(0xad), "KVM_CAP_KVMCLOCK_CTRL", Full, Vcpu(vcpu::kvmclock_ctrl)),
    row!("KVM_SET_DEVICE_ATTR", iow(0xe1, kvm_device_attr), "KVM_CAP_VCPU_ATTRIBUTES", Full, Vcpu(vcpu::set_device_attr)),
    row!("KVM_GET_DEVICE_ATTR", iow(0xe2, kvm_device_attr), "KVM_CAP_VCPU_ATTRIBUTES", Full, Vcpu(vcpu::get_device_attr)),
    row!("KVM_HAS_DEVICE_ATTR", iow(0xe3, kvm_device_attr), "KVM_CAP_VCPU_ATTRIBUTES", Full, Vcpu(vcpu::has_device_attr)),
    row!("KVM_GET_SUPPORTED_HV_CPUID", iowr(0xc1, kvm_cpuid2), "KVM_CAP_HYPERV_CPUID", HYPERV, None(Level::Vcpu)),
    row!("KVM_XEN_VCPU_GET_ATTR", iowr(0xca, kvm_xen_vcpu_attr), "KVM_CAP_XEN_HVM", XEN, None(Level::Vcpu)),
    row!("KVM_XEN_VCPU_SET_ATTR", iow(0xcb, kvm_xen_vcpu_attr), "KVM_CAP_XEN_HVM", XEN, None(Level::Vcpu)),
    // devices
    row!("KVM_SET_DEVICE_ATTR", iow(0xe1, kvm_device_attr), "KVM_CAP_DEVICE_CTRL", Full, Device(device::set_attr)),
    row!("KVM_GET_DEVICE_ATTR", iow(0xe2, kvm_device_attr), "KVM_CAP_DEVICE_CTRL", Full, Device(device::get_attr)),
    row!("KVM_HAS_DEVICE_ATTR", iow(0xe3, kvm_device_attr), "KVM_CAP_DEVICE_CTRL", Full, Device(device::has_attr)),
];
