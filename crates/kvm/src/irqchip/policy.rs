//! The few VM-wide rules that every interrupt controller of a VM looks at.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN, KVM_X86_QUIRK_LAPIC_MMIO_HOLE, KVM_X86_QUIRK_LINT0_REENABLED,
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
};

use crate::errno::Errno;

use super::message::MsiIds;

/// Which controllers are "in the kernel".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChipMode {
    /// None: the monitor has them all.
    None,
    /// LAPICs, IOAPIC, PICs (`KVM_CREATE_IRQCHIP`).
    Kernel,
    /// LAPICs only (`KVM_CAP_SPLIT_IRQCHIP`).
    Split,
}

/// VM-wide rules. Set before the vCPUs exist, mostly; read without a lock.
#[derive(Debug)]
pub struct Policy {
    mode: AtomicU8,
    ids_32bit: AtomicBool,
    no_broadcast_quirk: AtomicBool,
    disabled_quirks: AtomicU64,
    bus_cycle_ns: AtomicU64,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            mode: AtomicU8::new(0),
            ids_32bit: AtomicBool::new(false),
            no_broadcast_quirk: AtomicBool::new(false),
            disabled_quirks: AtomicU64::new(0),
            bus_cycle_ns: AtomicU64::new(1),
        }
    }
}

impl Policy {
    /// Which controllers there are.
    pub fn mode(&self) -> ChipMode {
        match self.mode.load(Ordering::Acquire) {
            0 => ChipMode::None,
            1 => ChipMode::Kernel,
            _ => ChipMode::Split,
        }
    }

    /// Says which controllers there are; once, before any vCPU.
    pub fn set_mode(&self, mode: ChipMode) {
        self.mode.store(mode as u8, Ordering::Release);
    }

    /// Whether the IOAPIC is ours.
    pub fn has_kernel_ioapic(&self) -> bool {
        self.mode() == ChipMode::Kernel
    }

    /// `KVM_CAP_X2APIC_API`.
    pub fn enable_x2apic_api(&self, flags: u64) -> Result<(), Errno> {
        let ids = u64::from(KVM_X2APIC_API_USE_32BIT_IDS);
        let quirk = u64::from(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
        if flags & !(ids | quirk) != 0 {
            return Err(Errno::EINVAL);
        }
        if flags & ids != 0 {
            self.ids_32bit.store(true, Ordering::Release);
        }
        if flags & quirk != 0 {
            self.no_broadcast_quirk.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether IDs are 32 bits wide in the API (`KVM_X2APIC_API_USE_32BIT_IDS`).
    pub fn has_32bit_ids(&self) -> bool {
        self.ids_32bit.load(Ordering::Acquire)
    }

    /// The width of an MSI's destination.
    pub fn msi_ids(&self) -> MsiIds {
        if self.has_32bit_ids() {
            MsiIds::ThirtyTwo
        } else {
            MsiIds::Eight
        }
    }

    /// Whether a device's message to 0xff reaches all APICs in x2APIC mode too.
    pub fn has_broadcast_quirk(&self) -> bool {
        !self.no_broadcast_quirk.load(Ordering::Acquire)
    }

    /// `KVM_CAP_DISABLE_QUIRKS` and `KVM_CAP_DISABLE_QUIRKS2`: all quirks that are off.
    pub fn set_disabled_quirks(&self, quirks: u64) {
        self.disabled_quirks.store(quirks, Ordering::Release);
    }

    fn has_quirk(&self, quirk: u32) -> bool {
        self.disabled_quirks.load(Ordering::Acquire) & u64::from(quirk) == 0
    }

    /// Whether the other vendor's hypercall instruction is exchanged for this host's.
    pub fn fixes_hypercalls(&self) -> bool {
        self.has_quirk(KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
    }

    /// Whether the bootstrap processor's LINT0 is open after reset.
    pub fn reenables_lint0(&self) -> bool {
        self.has_quirk(KVM_X86_QUIRK_LINT0_REENABLED)
    }

    /// Whether the register page swallows accesses even when the APIC is not in xAPIC mode.
    pub fn has_mmio_hole(&self) -> bool {
        self.has_quirk(KVM_X86_QUIRK_LAPIC_MMIO_HOLE)
    }

    /// Whether `MONITOR` and `MWAIT` do nothing even where CPUID doesn't announce them.
    pub fn never_refuses_mwait(&self) -> bool {
        self.has_quirk(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    }

    /// Whether a bit of `IA32_MISC_ENABLE` turns `MONITOR` and `MWAIT` on and off.
    pub fn heeds_mwait_switch(&self) -> bool {
        !self.has_quirk(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    }

    /// Nanoseconds of one cycle of the APIC's bus.
    pub fn bus_cycle_ns(&self) -> u64 {
        self.bus_cycle_ns.load(Ordering::Relaxed)
    }

    /// `KVM_CAP_X86_APIC_BUS_CYCLES_NS`, for vCPUs that are created afterwards.
    pub fn set_bus_cycle_ns(&self, ns: u64) -> Result<(), Errno> {
        if ns == 0 || (u64::from(u32::MAX) * 128).checked_mul(ns).is_none() {
            return Err(Errno::EINVAL);
        }
        self.bus_cycle_ns.store(ns, Ordering::Relaxed);
        Ok(())
    }
}
