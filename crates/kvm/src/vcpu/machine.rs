//! What a vCPU has besides its CPU: all that `KVM_GET_*` shows and no guest instruction reaches
//! directly.

use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_RUNNABLE;

use super::signal::SignalMask;
use super::vapic::TprAccess;
use crate::clock::steal::StealMeter;
use crate::cpuid::Cpuid;
use crate::msr::Msrs;

/// An exit whose answer is still to be taken from `kvm_run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Completion {
    /// None.
    #[default]
    None,
    /// A port access: bytes to take in (none for `OUT`).
    Port {
        /// How many bytes come in.
        bytes: usize,
    },
    /// An MMIO access: bytes to take in (none for a write).
    Mmio {
        /// How many bytes come in.
        bytes: usize,
    },
    /// `RDMSR` or `WRMSR`.
    Msr,
    /// A hypercall.
    Hypercall,
}

/// Whether the vCPU has run: its CPUID and feature MSRs are then fixed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Life {
    /// Never run.
    #[default]
    New,
    /// Has run.
    HasRun,
}

/// The rest of a vCPU. Guarded by the vCPU's lock.
#[derive(Debug)]
pub(crate) struct Machine {
    /// The guest's CPUID.
    pub(crate) cpuid: Cpuid,
    /// Whether it has run.
    pub(crate) life: Life,
    /// `KVM_MP_STATE_*`.
    pub(crate) mp_state: u32,
    /// MSRs that are not the CPU's own.
    pub(crate) msrs: Msrs,
    /// `kvm_guest_debug.control`, 0 where debugging is off.
    pub(crate) debug_control: u32,
    /// CR8, where the monitor has the local APIC.
    pub(crate) cr8: u8,
    /// `IA32_APIC_BASE`, where the monitor has the local APIC.
    pub(crate) apic_base: u64,
    /// The signals blocked during `KVM_RUN`, where the monitor gave a mask.
    pub(crate) signal_mask: Option<SignalMask>,
    /// The exit that the monitor works on.
    pub(crate) completion: Completion,
    /// The guest's clock page must be written before the guest runs on.
    pub(crate) clock_stale: bool,
    /// The VM's clock when the page was written last.
    pub(crate) clock_generation: u64,
    /// The guest was stopped, and will be told.
    pub(crate) paused: bool,
    /// What the thread was kept from running, for steal time.
    pub(crate) steal: Option<StealMeter>,
    /// CR8 was lowered below what the monitor knows: it must look for interrupts.
    pub(crate) tpr_exit: bool,
    /// An access of the task priority that the monitor is to see next.
    pub(crate) tpr_access: Option<TprAccess>,
    /// The guest may end the interrupt in service by clearing its paravirtual byte.
    pub(crate) eoi_offered: bool,
    /// The guest halted, where that is its CPU's own affair.
    pub(crate) halted_in_guest: bool,
    /// How long the next sleep is preceded by polling.
    pub(crate) poll_time: Duration,
    /// The guest's TSC frequency.
    pub(crate) tsc_khz: u32,
    /// Refuse paravirtual features that the CPUID doesn't show.
    pub(crate) enforce_pv: bool,
    /// `KVM_TPR_ACCESS_REPORTING`.
    pub(crate) tpr_reporting: bool,
    /// `KVM_SET_VAPIC_ADDR`.
    pub(crate) vapic_address: u64,
    /// An NMI that the monitor says is being delivered.
    pub(crate) nmi_injected: bool,
}

impl Machine {
    /// A reset of the local APIC ends what it shared with the guest, and a halt.
    pub(crate) fn forget_shared_apic(&mut self) {
        self.msrs.paravirtual.forget_eoi();
        self.eoi_offered = false;
        self.vapic_address = 0;
        self.halted_in_guest = false;
    }

    /// A vCPU that was just made.
    pub(crate) fn new(apic_base: u64, tsc_khz: u32) -> Self {
        Self {
            cpuid: Cpuid::default(),
            life: Life::New,
            mp_state: KVM_MP_STATE_RUNNABLE,
            msrs: Msrs::default(),
            debug_control: 0,
            cr8: 0,
            apic_base,
            signal_mask: None,
            completion: Completion::None,
            clock_stale: false,
            clock_generation: 0,
            paused: false,
            steal: None,
            tpr_exit: false,
            tpr_access: None,
            eoi_offered: false,
            halted_in_guest: false,
            poll_time: Duration::ZERO,
            tsc_khz,
            enforce_pv: false,
            tpr_reporting: false,
            vapic_address: 0,
            nmi_injected: false,
        }
    }
}
