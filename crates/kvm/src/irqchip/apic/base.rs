//! `IA32_APIC_BASE` and the modes of the APIC (SDM 3A, 12.4.3 and 12.12.1), and the resets.

use std::sync::atomic::Ordering;

use super::registers::{self, lvt, lvt_register, reg, x2apic_ldr};
use super::{ApicFeatures, Effects, Lapic, Reset, Role};

const BSP: u64 = 1 << 8;
const EXTD: u64 = 1 << 10;
const ENABLE: u64 = 1 << 11;
const ADDRESS: u64 = 0xffff_f000;

/// Where the register page is after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// The mode that a value of `IA32_APIC_BASE` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Off.
    Disabled,
    /// Registers in memory.
    Xapic,
    /// Registers are MSRs.
    X2apic,
    /// EXTD without EN.
    Invalid,
}

impl ApicMode {
    /// The mode of `base`.
    pub fn of(base: u64) -> ApicMode {
        match (base & ENABLE != 0, base & EXTD != 0) {
            (false, false) => ApicMode::Disabled,
            (true, false) => ApicMode::Xapic,
            (true, true) => ApicMode::X2apic,
            (false, true) => ApicMode::Invalid,
        }
    }
}

/// Who writes `IA32_APIC_BASE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseWriter {
    /// `WRMSR`: only the transitions that the manual draws.
    Guest,
    /// An ioctl: any transition between valid modes.
    Monitor,
}

/// Whether `new` may replace `old`; otherwise `#GP`, or the ioctl fails.
pub fn check_base(old: u64, new: u64, writer: BaseWriter, features: ApicFeatures) -> bool {
    let above = u64::MAX
        .checked_shl(u32::from(features.physical_bits))
        .unwrap_or(0);
    let reserved = above | 0x2ff | if features.x2apic { 0 } else { EXTD };
    let (from, to) = (ApicMode::of(old), ApicMode::of(new));
    if new & reserved != 0 || to == ApicMode::Invalid {
        return false;
    }
    let forbidden = matches!(
        (from, to),
        (ApicMode::X2apic, ApicMode::Xapic) | (ApicMode::Disabled, ApicMode::X2apic)
    );
    writer == BaseWriter::Monitor || !forbidden
}

impl Lapic {
    /// `IA32_APIC_BASE`.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Relaxed)
    }

    /// Where the register page is. Like kvm.ko, this looks at the lower 4 GiB only.
    pub fn base_address(&self) -> u64 {
        self.base() & ADDRESS
    }

    /// The present mode.
    pub fn mode(&self) -> ApicMode {
        ApicMode::of(self.base())
    }

    /// Whether `IA32_APIC_BASE` enables it.
    pub fn is_hardware_enabled(&self) -> bool {
        self.base() & ENABLE != 0
    }

    /// Whether it is in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.base() & EXTD != 0
    }

    /// Writes `IA32_APIC_BASE`, if [`check_base`] allows it.
    pub fn set_base(&self, value: u64, writer: BaseWriter) -> Result<Effects, super::Refused> {
        if !check_base(self.base(), value, writer, self.features()) {
            return Err(super::Refused);
        }
        self.store_base(value);
        Ok(Effects::ADDRESSING)
    }

    fn store_base(&self, value: u64) {
        let changed = self.base.swap(value, Ordering::SeqCst) ^ value;
        if changed & ENABLE != 0 && value & ENABLE != 0 {
            self.page.set(reg::ID, (self.id & 0xff) << 24);
        }
        if changed & EXTD == 0 {
            return;
        }
        if value & EXTD != 0 {
            self.page.set(reg::ID, self.id);
            self.page.set(reg::LDR, x2apic_ldr(self.id));
        } else if value & ENABLE != 0 {
            self.page.set(reg::ID, (self.id & 0xff) << 24);
        }
    }

    pub(super) fn set_version(&self) {
        let entries = self.lvt_entries.load(Ordering::Relaxed);
        let mut version = 0x14 | (u32::from(entries - 1) << 16);
        if self.x2apic_allowed.load(Ordering::Relaxed) && !self.policy.has_kernel_ioapic() {
            version |= registers::LVR_DIRECTED_EOI;
        }
        self.page.set(reg::LVR, version);
    }

    /// RESET or INIT. How messages find their targets is stale afterwards.
    pub fn reset(&self, kind: Reset) -> Effects {
        if kind == Reset::Power {
            let bsp = if self.role == Role::Bootstrap { BSP } else { 0 };
            self.store_base(DEFAULT_BASE | ENABLE | bsp);
            self.page.set(reg::ID, (self.id & 0xff) << 24);
        }
        self.with_timer(|timer, _| timer.stop());
        self.set_version();
        self.reset_lvt();
        self.reset_registers();
        self.with_timer(|timer, _| {
            timer.load_divide(0);
            timer.clear_pending();
        });
        self.update_ppr();
        self.arbitration.store(0, Ordering::Relaxed);
        Effects::ADDRESSING
    }

    fn reset_lvt(&self) {
        for index in 0..self.lvt_entries.load(Ordering::Relaxed) {
            self.page.set(lvt_register(index), lvt::MASKED);
        }
        self.update_timer_mode();
        if self.role == Role::Bootstrap && self.policy.reenables_lint0() {
            self.page.set(reg::LVT0, lvt::MODE_EXTINT);
        }
    }

    fn reset_registers(&self) {
        self.page.set(reg::DFR, registers::DFR_FLAT);
        self.page.set(reg::SPIV, 0xff);
        if !self.is_x2apic() {
            self.page.set(reg::LDR, 0);
        }
        for register in [
            reg::TASKPRI,
            reg::ESR,
            reg::ICR,
            reg::ICR2,
            reg::TDCR,
            reg::TMICT,
        ] {
            self.page.set(register, 0);
        }
        for word in 0..8 {
            for bitmap in [reg::IRR, reg::ISR, reg::TMR] {
                self.page.set(bitmap + 0x10 * word, 0);
            }
        }
    }
}
