//! The seam: one trait for a VM and one for a vCPU, on the kernel's KVM or on ours.
//!
//! The traits are KVM's API with `kvm-bindings`' types (`Documentation/virt/kvm/api.rst`): what a
//! call does, and the errno of one that fails, is what that document says. There are two
//! implementations, [`kernel`] on `/dev/kvm` and [`user`] on the crate `kvm`; [`choose`] picks one
//! and says why.
//!
//! | object          | made by                      | used from                                      |
//! |-----------------|------------------------------|------------------------------------------------|
//! | [`Accelerator`] | [`choose`]                   | any thread                                     |
//! | [`Vm`]          | [`Accelerator::create_vm`]   | any thread, shared                             |
//! | [`Vcpu`]        | [`Vm::create_vcpu`]          | one thread at a time; `run` in the vCPU thread |
//! | [`Kicker`]      | [`Vcpu::kicker`]             | any thread, and signal handlers                |

mod choice;
pub mod detect;
mod exit;
pub mod kernel;
pub mod user;

use std::sync::Arc;

use addr::Gpa;
use kvm_bindings::{
    CpuId, MsrList, kvm_clear_dirty_log, kvm_clock_data, kvm_debugregs, kvm_enable_cap, kvm_fpu,
    kvm_guest_debug, kvm_ioeventfd, kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msi, kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_translation, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

pub use choice::{Choice, Kind, Preference, Refused, choose};
pub use exit::{Exit, decode};

/// An errno of the KVM API.
pub type Errno = vmm_sys_util::errno::Error;

/// What a call of the KVM API gives.
pub type Result<T> = std::result::Result<T, Errno>;

/// A KVM: the kernel's or ours (`/dev/kvm`, the system ioctls).
pub trait Accelerator: Send + Sync {
    /// Which one.
    fn kind(&self) -> Kind;
    /// `KVM_CHECK_EXTENSION`: 0 for what is not there.
    fn check_extension(&self, capability: u32) -> i32;
    /// `KVM_GET_SUPPORTED_CPUID`.
    fn supported_cpuid(&self) -> Result<CpuId>;
    /// `KVM_GET_MSR_INDEX_LIST`.
    fn msr_index_list(&self) -> Result<MsrList>;
    /// `KVM_CREATE_VM`.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
}

/// A virtual machine: memory slots, interrupt controllers, vCPUs.
pub trait Vm: Send + Sync {
    /// `KVM_CHECK_EXTENSION` on the VM.
    fn check_extension(&self, capability: u32) -> i32;
    /// `KVM_ENABLE_CAP` on the VM.
    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()>;
    /// The MMU behind the VM, for those who show it; the kernel's keeps its own to itself.
    fn mmu(&self) -> Option<Arc<mmu::Mmu>> {
        None
    }

    /// `KVM_SET_USER_MEMORY_REGION`.
    ///
    /// # Safety
    /// The range of host memory becomes guest memory: the guest reads and writes it at any time
    /// until the slot is deleted or changed, so Rust code may only use it as volatile memory.
    #[expect(unsafe_code, reason = "the guest becomes another owner of the memory")]
    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()>;
    /// `KVM_GET_DIRTY_LOG` of a slot of `pages` pages: a bitmap, bit 0 of word 0 the first page.
    fn get_dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>>;
    /// `KVM_CLEAR_DIRTY_LOG` of the pages whose bits are set in `bitmap`.
    fn clear_dirty_log(&self, range: &kvm_clear_dirty_log, bitmap: &[u64]) -> Result<()>;
    /// `KVM_SET_TSS_ADDR`.
    fn set_tss_address(&self, address: Gpa) -> Result<()>;
    /// `KVM_SET_IDENTITY_MAP_ADDR`.
    fn set_identity_map_address(&self, address: Gpa) -> Result<()>;

    /// `KVM_CREATE_IRQCHIP`: a LAPIC for each vCPU, an IOAPIC, two PICs.
    fn create_irqchip(&self) -> Result<()>;
    /// `KVM_GET_IRQCHIP`: `chip.chip_id` says which.
    fn get_irqchip(&self, chip: &mut kvm_irqchip) -> Result<()>;
    /// `KVM_SET_IRQCHIP`.
    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<()>;
    /// `KVM_CREATE_PIT2`.
    fn create_pit2(&self, config: &kvm_pit_config) -> Result<()>;
    /// `KVM_GET_PIT2`.
    fn get_pit2(&self) -> Result<kvm_pit_state2>;
    /// `KVM_SET_PIT2`.
    fn set_pit2(&self, state: &kvm_pit_state2) -> Result<()>;
    /// `KVM_IRQ_LINE`.
    fn set_irq_line(&self, gsi: u32, level: Level) -> Result<()>;
    /// `KVM_SET_GSI_ROUTING`: replaces all routes.
    fn set_gsi_routing(&self, routes: &[kvm_irq_routing_entry]) -> Result<()>;
    /// `KVM_SIGNAL_MSI`: how many vCPUs took it; 0, the guest blocked it.
    fn signal_msi(&self, msi: &kvm_msi) -> Result<i32>;
    /// `KVM_IRQFD`.
    fn irqfd(&self, irqfd: &kvm_irqfd) -> Result<()>;
    /// `KVM_IOEVENTFD`.
    fn ioeventfd(&self, ioeventfd: &kvm_ioeventfd) -> Result<()>;

    /// `KVM_GET_CLOCK`.
    fn get_clock(&self) -> Result<kvm_clock_data>;
    /// `KVM_SET_CLOCK`.
    fn set_clock(&self, clock: &kvm_clock_data) -> Result<()>;

    /// `KVM_CREATE_VCPU`.
    fn create_vcpu(&self, id: u64) -> Result<Box<dyn Vcpu>>;
}

/// The level of an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Level {
    Low,
    High,
}

/// One entry of a TLB that can be looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry {
    /// Where the byte asked about lies in the monitor.
    pub hva: addr::Hva,
    /// Reads go through without asking.
    pub read: bool,
    /// Writes go through without asking.
    pub write: bool,
}

/// A virtual CPU.
pub trait Vcpu: Send {
    /// `KVM_RUN`: runs guest code until the monitor is needed.
    ///
    /// What the monitor answers (a port or MMIO read, an MSR) goes into the exit's `data`; the next
    /// run completes the instruction. `EINTR` and `EAGAIN` are [`Exit::Interrupted`].
    fn run(&mut self) -> Result<Exit<'_>>;
    /// A handle that makes [`Vcpu::run`] return.
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// Asks for [`Exit::InterruptWindow`] when the guest can take an interrupt (only where the
    /// interrupt controllers are the monitor's).
    fn request_interrupt_window(&mut self, request: Level);
    /// Whether, at the last exit, the guest could take an interrupt.
    fn ready_for_interrupt(&self) -> bool;

    /// `KVM_GET_REGS`.
    fn get_regs(&self) -> Result<kvm_regs>;
    /// `KVM_SET_REGS`.
    fn set_regs(&self, regs: &kvm_regs) -> Result<()>;
    /// `KVM_GET_SREGS`.
    fn get_sregs(&self) -> Result<kvm_sregs>;
    /// `KVM_GET_SREGS2`: the PDPTEs that the CPU has loaded, where it has some and tells.
    fn pdptrs(&self) -> Option<[u64; 4]>;
    /// `KVM_SET_SREGS`.
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()>;
    /// `KVM_GET_FPU`.
    fn get_fpu(&self) -> Result<kvm_fpu>;
    /// `KVM_SET_FPU`.
    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()>;
    /// `KVM_GET_XSAVE`.
    fn get_xsave(&self) -> Result<kvm_xsave>;
    /// `KVM_SET_XSAVE`.
    fn set_xsave(&self, xsave: &kvm_xsave) -> Result<()>;
    /// `KVM_GET_XCRS`.
    fn get_xcrs(&self) -> Result<kvm_xcrs>;
    /// `KVM_SET_XCRS`.
    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()>;
    /// `KVM_GET_DEBUGREGS`.
    fn get_debugregs(&self) -> Result<kvm_debugregs>;
    /// `KVM_SET_DEBUGREGS`.
    fn set_debugregs(&self, regs: &kvm_debugregs) -> Result<()>;
    /// `KVM_GET_MSRS`: fills in `data`; how many were read before the first that is unknown.
    fn get_msrs(&self, msrs: &mut [kvm_msr_entry]) -> Result<usize>;
    /// `KVM_SET_MSRS`: how many were written before the first that was refused.
    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize>;
    /// `KVM_GET_CPUID2`.
    fn get_cpuid(&self) -> Result<CpuId>;
    /// `KVM_SET_CPUID2`.
    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()>;
    /// `KVM_GET_VCPU_EVENTS`.
    fn get_vcpu_events(&self) -> Result<kvm_vcpu_events>;
    /// `KVM_SET_VCPU_EVENTS`.
    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<()>;
    /// `KVM_GET_MP_STATE`.
    fn get_mp_state(&self) -> Result<kvm_mp_state>;
    /// `KVM_SET_MP_STATE`.
    fn set_mp_state(&self, state: kvm_mp_state) -> Result<()>;
    /// `KVM_GET_LAPIC`.
    fn get_lapic(&self) -> Result<kvm_lapic_state>;
    /// `KVM_SET_LAPIC`.
    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()>;
    /// `KVM_INTERRUPT`: queues `vector` where the interrupt controllers are the monitor's.
    fn interrupt(&self, vector: u8) -> Result<()>;
    /// `KVM_NMI`.
    fn nmi(&self) -> Result<()>;
    /// `KVM_TRANSLATE`.
    fn translate(&self, gva: addr::Gva) -> Result<kvm_translation>;
    /// What its TLB holds for an address, for those who show it: `None` where the accelerator can't
    /// tell, `Some(None)` where it holds nothing.
    fn tlb(&self, _gva: addr::Gva, _privilege: mmu::Privilege) -> Option<Option<TlbEntry>> {
        None
    }
    /// `KVM_SET_GUEST_DEBUG`.
    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<()>;
    /// `KVM_GET_TSC_KHZ`.
    fn tsc_khz(&self) -> Result<u32>;
    /// `KVM_ENABLE_CAP` on the vCPU.
    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()>;
}

/// The PDPTEs in what `KVM_GET_SREGS2` tells.
fn loaded_pdptrs(sregs: &kvm_bindings::kvm_sregs2) -> Option<[u64; 4]> {
    let valid = sregs.flags & u64::from(kvm_bindings::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    valid.then_some(sregs.pdptrs)
}

/// Makes a vCPU leave guest code.
pub trait Kicker: Send + Sync {
    /// The run in progress, or else the next one, returns [`Exit::Interrupted`]. Takes no lock and
    /// allocates nothing: it may be called from a signal handler.
    fn kick(&self);
}
