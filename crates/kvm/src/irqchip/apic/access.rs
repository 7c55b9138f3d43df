//! Reading and writing registers: by memory in xAPIC mode, by MSR in x2APIC mode (SDM 3A, 12.4.1
//! and 12.12.1.2).

use std::sync::atomic::Ordering;

use super::registers::{
    self, LVR_DIRECTED_EOI, SPIV_DIRECTED_EOI, SPIV_ENABLED, lvt, lvt_index, lvt_register,
    lvt_writable, reg,
};
use super::timer::{InitialCount, Mode, Timer};
use super::{Effects, Lapic, Message};

/// The register or the value does not exist: `#GP` for an MSR, nothing at all in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Bits of the 64-bit ICR that must be 0.
const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;
/// Bits of the spurious-vector register that always exist.
const SPIV_WRITABLE: u32 = 0x3ff;

type Written = Result<Effects, Refused>;

impl Lapic {
    /// Reads the register at `offset` of the page, up to four bytes of it.
    pub fn read_memory(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let start = (offset & 0xf) as usize;
        if start + data.len() > 4 {
            return;
        }
        if let Ok(value) = self.read(offset & !0xf) {
            data.copy_from_slice(&value.to_le_bytes()[start..start + data.len()]);
        }
    }

    /// Writes the register at `offset` of the page. Only aligned writes of four bytes do anything.
    pub fn write_memory(&self, offset: u32, data: &[u8]) -> Effects {
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(16) => self
                .write(offset & 0xff0, u32::from_le_bytes(bytes))
                .unwrap_or(Effects::NONE),
            _ => Effects::NONE,
        }
    }

    /// `RDMSR` of 0x800 to 0x8ff.
    pub fn read_msr(&self, index: u32) -> Result<u64, Refused> {
        if !self.is_x2apic() {
            return Err(Refused);
        }
        match Self::msr_register(index) {
            reg::ICR => Ok(
                u64::from(self.page.get(reg::ICR)) | (u64::from(self.page.get(reg::ICR2)) << 32)
            ),
            register => self.read(register).map(u64::from),
        }
    }

    /// `WRMSR` of 0x800 to 0x8ff.
    pub fn write_msr(&self, index: u32, value: u64) -> Written {
        if !self.is_x2apic() {
            return Err(Refused);
        }
        match Self::msr_register(index) {
            reg::ICR => self.write_x2apic_icr(value),
            _ if value >> 32 != 0 => Err(Refused),
            register => self.write(register, value as u32),
        }
    }

    fn msr_register(index: u32) -> u32 {
        (index & 0xff) << 4
    }

    fn is_readable(&self, register: u32) -> bool {
        match register {
            reg::ARBPRI | reg::DFR | reg::ICR2 => !self.is_x2apic(),
            reg::LVTCMCI => self.has_lvt(6),
            reg::ID
            | reg::LVR
            | reg::TASKPRI
            | reg::PROCPRI
            | reg::LDR
            | reg::SPIV
            | reg::ISR..=0x270
            | reg::ESR
            | reg::ICR
            | reg::LVTT..=reg::LVTERR
            | reg::TMICT
            | reg::TMCCT
            | reg::TDCR => true,
            _ => false,
        }
    }

    fn read(&self, register: u32) -> Result<u32, Refused> {
        if !self.is_readable(register) {
            return Err(Refused);
        }
        Ok(match register {
            reg::ARBPRI => 0,
            reg::TMCCT => self.current_count(),
            reg::PROCPRI => self.update_ppr(),
            _ => self.page.get(register),
        })
    }

    pub(super) fn current_count(&self) -> u32 {
        let now = self.time.now();
        self.timer_lock()
            .current_count(self.page.get(reg::TMICT), now)
    }

    fn has_lvt(&self, index: u8) -> bool {
        index < self.lvt_entries.load(Ordering::Relaxed)
    }

    fn write(&self, register: u32, value: u32) -> Written {
        match register {
            reg::ID | reg::LDR | reg::DFR => self.write_address(register, value),
            reg::TASKPRI => {
                self.set_tpr(value & 0xff);
                Ok(Effects::NONE)
            }
            reg::EOI => Ok(self.write_eoi()),
            reg::SPIV => Ok(self.write_spiv(value)),
            reg::ICR | reg::ICR2 | reg::SELF_IPI => self.write_ipi(register, value),
            reg::LVTT => Ok(self.write_timer_lvt(value)),
            reg::LVTTHMR..=reg::LVTERR | reg::LVTCMCI => self.write_lvt(register, value),
            reg::TMICT | reg::TDCR => Ok(self.write_timer(register, value)),
            reg::ESR if !self.is_x2apic() || value == 0 => Ok(Effects::NONE),
            _ => Err(Refused),
        }
    }

    fn write_address(&self, register: u32, value: u32) -> Written {
        if self.is_x2apic() {
            return Err(Refused);
        }
        let value = match register {
            reg::DFR => value | registers::DFR_CLUSTER,
            _ => value & 0xff00_0000,
        };
        self.page.set(register, value);
        Ok(Effects::ADDRESSING)
    }

    pub(super) fn write_eoi(&self) -> Effects {
        let eoi = self.end_of_interrupt();
        if eoi.is_some() {
            self.notice_interrupt();
        }
        Effects {
            eoi,
            ..Effects::NONE
        }
    }

    fn write_spiv(&self, value: u32) -> Effects {
        let directed = self.page.get(reg::LVR) & LVR_DIRECTED_EOI != 0;
        let writable = SPIV_WRITABLE | if directed { SPIV_DIRECTED_EOI } else { 0 };
        let effects = self.set_spiv(value & writable);
        if value & SPIV_ENABLED == 0 {
            for index in 0..self.lvt_entries.load(Ordering::Relaxed) {
                let register = lvt_register(index);
                self.page
                    .set(register, self.page.get(register) | lvt::MASKED);
            }
            self.update_timer_mode();
            self.with_timer(|timer, _| timer.clear_pending());
        }
        effects
    }

    pub(super) fn set_spiv(&self, value: u32) -> Effects {
        let changed = (self.page.get(reg::SPIV) ^ value) & SPIV_ENABLED != 0;
        self.page.set(reg::SPIV, value);
        Effects {
            addressing_changed: changed,
            ..Effects::NONE
        }
    }

    fn write_ipi(&self, register: u32, value: u32) -> Written {
        match register {
            reg::ICR => {
                let low = value & !registers::ICR_BUSY;
                self.page.set(reg::ICR, low);
                Ok(Self::send(low, self.page.get(reg::ICR2) >> 24))
            }
            reg::ICR2 if !self.is_x2apic() => {
                self.page.set(reg::ICR2, value & 0xff00_0000);
                Ok(Effects::NONE)
            }
            reg::SELF_IPI if self.is_x2apic() && value & !lvt::VECTOR == 0 => {
                Ok(Self::send((1 << 18) | value, 0))
            }
            _ => Err(Refused),
        }
    }

    fn write_x2apic_icr(&self, value: u64) -> Written {
        if value & X2APIC_ICR_RESERVED != 0 {
            return Err(Refused);
        }
        let low = value as u32 & !registers::ICR_BUSY;
        let destination = (value >> 32) as u32;
        self.page.set(reg::ICR, low);
        self.page.set(reg::ICR2, destination);
        Ok(Self::send(low, destination))
    }

    fn send(icr: u32, destination: u32) -> Effects {
        Effects {
            ipi: Some(Message::from_icr(icr, destination)),
            ..Effects::NONE
        }
    }

    fn write_lvt(&self, register: u32, value: u32) -> Written {
        let index = lvt_index(register)
            .filter(|index| self.has_lvt(*index))
            .ok_or(Refused)?;
        self.page
            .set(register, (value | self.forced_mask()) & lvt_writable(index));
        if register == reg::LVT0 {
            // The 8259 may have been waiting for this.
            self.wake.interrupt();
        }
        Ok(Effects::NONE)
    }

    fn forced_mask(&self) -> u32 {
        if self.is_software_enabled() {
            0
        } else {
            lvt::MASKED
        }
    }

    fn write_timer_lvt(&self, value: u32) -> Effects {
        let writable = lvt_writable(0) | self.timer_mode_mask.load(Ordering::Relaxed);
        self.page
            .set(reg::LVTT, (value | self.forced_mask()) & writable);
        self.update_timer_mode();
        self.notice_interrupt();
        Effects::NONE
    }

    /// Takes the timer's mode from its LVT entry.
    pub(super) fn update_timer_mode(&self) {
        let mask = self.timer_mode_mask.load(Ordering::Relaxed);
        let mode = Mode::from_lvt(self.page.get(reg::LVTT) & mask);
        if self.with_timer(|timer, _| timer.set_mode(mode)) == InitialCount::BecomesZero {
            self.page.set(reg::TMICT, 0);
        }
    }

    fn write_timer(&self, register: u32, value: u32) -> Effects {
        let tmict = self.page.get(reg::TMICT);
        self.with_timer(|timer: &mut Timer, now| match register {
            reg::TMICT if timer.mode() == Mode::TscDeadline => {}
            reg::TMICT => {
                self.page.set(reg::TMICT, value);
                timer.set_initial_count(value, now);
            }
            _ => {
                self.page.set(reg::TDCR, value & 0xb);
                timer.set_divide(value & 0xb, tmict, now);
            }
        });
        self.notice_interrupt();
        Effects::NONE
    }
}
