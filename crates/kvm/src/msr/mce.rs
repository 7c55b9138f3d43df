//! Machine checks: the banks' registers, `KVM_X86_SETUP_MCE`, `KVM_X86_SET_MCE`.

use kvm_bindings::kvm_x86_mce;

use super::index::{MC0_CTL, MC0_CTL2, MCG_CAP, MCG_CTL, MCG_STATUS, P5_MC_ADDR, P5_MC_TYPE};
use super::{Refused, Writer};
use crate::errno::Errno;
use crate::table::MAX_MCE_BANKS;

const BANKS: usize = MAX_MCE_BANKS as usize;
const BANK_REGISTERS: u32 = 4 * MAX_MCE_BANKS;

/// `MCG_CAP`: `MCG_CTL` exists.
const CAP_CTL: u64 = 1 << 8;
/// `MCG_CAP`: corrected errors raise an interrupt.
const CAP_CMCI: u64 = 1 << 10;
/// `MCG_CAP`: software can recover.
const CAP_SER: u64 = 1 << 24;
/// What `KVM_X86_GET_MCE_CAP_SUPPORTED` answers.
pub(crate) const SUPPORTED: u64 = CAP_CTL | CAP_CMCI | CAP_SER;

const STATUS_VALID: u64 = 1 << 63;
const STATUS_OVERFLOW: u64 = 1 << 62;
const STATUS_UNCORRECTED: u64 = 1 << 61;
/// Context corrupt, signalled by `#MC`, action required.
const STATUS_SEVERE: u64 = 1 << 57 | 1 << 56 | 1 << 55;
const MCG_IN_PROGRESS: u64 = 1 << 2;
/// `MCi_CTL2`: interrupt enable and threshold.
const CTL2_BITS: u64 = CTL2_INTERRUPT | 0x7fff;
const CTL2_INTERRUPT: u64 = 1 << 30;

/// The registers of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Banks {
    cap: u64,
    status: u64,
    ctl: u64,
    /// Control, status, address, misc of each bank.
    registers: [u64; 4 * BANKS],
    ctl2: [u64; BANKS],
}

impl Default for Banks {
    fn default() -> Self {
        Self {
            cap: u64::from(MAX_MCE_BANKS),
            status: 0,
            ctl: 0,
            registers: [0; 4 * BANKS],
            ctl2: [0; BANKS],
        }
    }
}

/// What a machine check means for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Raised {
    /// Only noted.
    Nothing,
    /// The local APIC's interrupt for corrected machine checks.
    CorrectedInterrupt,
    /// `#MC`.
    MachineCheck,
    /// The guest can't take it.
    TripleFault,
}

impl Banks {
    pub(crate) fn owns(index: u32) -> bool {
        matches!(
            index,
            P5_MC_ADDR | P5_MC_TYPE | MCG_CAP | MCG_CTL | MCG_STATUS
        ) || (MC0_CTL..MC0_CTL + BANK_REGISTERS).contains(&index)
            || (MC0_CTL2..MC0_CTL2 + MAX_MCE_BANKS).contains(&index)
    }

    fn count(&self) -> u32 {
        (self.cap & 0xff) as u32
    }

    fn bank_register(&self, index: u32) -> Option<usize> {
        let offset = index.checked_sub(MC0_CTL)?;
        (offset < 4 * self.count()).then_some(offset as usize)
    }

    fn ctl2_register(&self, index: u32) -> Option<usize> {
        let offset = index.checked_sub(MC0_CTL2)?;
        (offset < self.count()).then_some(offset as usize)
    }

    pub(crate) fn read(&self, index: u32, reader: Writer) -> Result<u64, Refused> {
        let guest_needs = |cap| {
            let there = self.cap & cap != 0 || reader == Writer::Monitor;
            there.then_some(()).ok_or(Refused::Invalid)
        };
        match index {
            P5_MC_ADDR | P5_MC_TYPE => Ok(0),
            MCG_CAP => Ok(self.cap),
            MCG_STATUS => Ok(self.status),
            MCG_CTL => guest_needs(CAP_CTL).map(|()| self.ctl),
            _ => {
                if let Some(i) = self.bank_register(index) {
                    return Ok(self.registers[i]);
                }
                let i = self.ctl2_register(index).ok_or(Refused::Invalid)?;
                guest_needs(CAP_CMCI).map(|()| self.ctl2[i])
            }
        }
    }

    pub(crate) fn write(&mut self, index: u32, value: u64, writer: Writer) -> Result<(), Refused> {
        let by_monitor = writer == Writer::Monitor;
        match index {
            MCG_STATUS => self.status = value,
            MCG_CTL => {
                let there = self.cap & CAP_CTL != 0 || value == 0 && by_monitor;
                if !there || value != 0 && value != !0 {
                    return Err(Refused::Invalid);
                }
                self.ctl = value;
            }
            _ => {
                if let Some(i) = self.bank_register(index) {
                    return self.write_bank(i, value, by_monitor);
                }
                let i = self.ctl2_register(index).ok_or(Refused::Invalid)?;
                let there = self.cap & CAP_CMCI != 0 || value == 0 && by_monitor;
                if !there || value & !CTL2_BITS != 0 {
                    return Err(Refused::Invalid);
                }
                self.ctl2[i] = value;
            }
        }
        Ok(())
    }

    /// A control register is all ones or zero (kernels clear bits 0 and 10 of some); a status can
    /// only be cleared.
    fn write_bank(&mut self, i: usize, value: u64, by_monitor: bool) -> Result<(), Refused> {
        let bad = match i % 4 {
            0 => value != 0 && value | 1 << 10 | 1 != !0,
            1 => value != 0 && !by_monitor,
            _ => false,
        };
        if bad {
            return Err(Refused::Invalid);
        }
        self.registers[i] = value;
        Ok(())
    }

    /// `KVM_X86_SETUP_MCE`.
    pub(crate) fn set_up(&mut self, cap: u64) -> Result<(), Errno> {
        let count = cap & 0xff;
        let known = SUPPORTED | 0xff | 0xff_0000;
        if count == 0 || count > u64::from(MAX_MCE_BANKS) || cap & !known != 0 {
            return Err(Errno::EINVAL);
        }
        self.cap = cap;
        if cap & CAP_CTL != 0 {
            self.ctl = !0;
        }
        for bank in 0..count as usize {
            self.registers[4 * bank] = !0;
        }
        Ok(())
    }

    /// `KVM_X86_SET_MCE`. `cr4_mce`: the guest takes machine checks.
    pub(crate) fn inject(&mut self, mce: &kvm_x86_mce, cr4_mce: bool) -> Result<Raised, Errno> {
        if u32::from(mce.bank) >= self.count() || mce.status & STATUS_VALID == 0 {
            return Err(Errno::EINVAL);
        }
        let first = 4 * usize::from(mce.bank);
        let uncorrected = mce.status & STATUS_UNCORRECTED != 0;
        if uncorrected && mce.mcg_status == 0 && mce.status & STATUS_SEVERE == 0 {
            return Ok(self.note(mce));
        }
        let reported = self.cap & CAP_CTL == 0 || self.ctl == !0;
        if uncorrected && (!reported || self.registers[first] != !0) {
            return Ok(Raised::Nothing);
        }
        if uncorrected {
            if self.status & MCG_IN_PROGRESS != 0 || !cr4_mce {
                return Ok(Raised::TripleFault);
            }
            self.status = mce.mcg_status;
            self.log(first, mce);
            return Ok(Raised::MachineCheck);
        }
        let present = self.registers[first + 1];
        if present & STATUS_VALID != 0 && present & STATUS_UNCORRECTED != 0 {
            self.registers[first + 1] |= STATUS_OVERFLOW;
        } else {
            self.log(first, mce);
        }
        Ok(Raised::Nothing)
    }

    /// An uncorrected error that asks for no action (SDM 3B, 16.6.3).
    fn note(&mut self, mce: &kvm_x86_mce) -> Raised {
        let bank = usize::from(mce.bank);
        self.registers[4 * bank + 1..4 * bank + 4]
            .copy_from_slice(&[mce.status, mce.addr, mce.misc]);
        self.status = mce.mcg_status;
        if self.has_cmci() && self.ctl2[bank] & CTL2_INTERRUPT != 0 {
            Raised::CorrectedInterrupt
        } else {
            Raised::Nothing
        }
    }

    /// Whether corrected machine checks interrupt.
    pub(crate) fn has_cmci(&self) -> bool {
        self.cap & CAP_CMCI != 0
    }

    fn log(&mut self, first: usize, mce: &kvm_x86_mce) {
        let overflow = match self.registers[first + 1] & STATUS_VALID {
            0 => 0,
            _ => STATUS_OVERFLOW,
        };
        self.registers[first + 1] = mce.status | overflow;
        self.registers[first + 2] = mce.addr;
        self.registers[first + 3] = mce.misc;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uncorrected_errors_raise() {
        let mut banks = Banks::default();
        banks.set_up(0xa | CAP_CTL | CAP_SER).unwrap();
        let mce = kvm_x86_mce {
            status: STATUS_VALID | STATUS_UNCORRECTED,
            addr: 0x1000,
            mcg_status: 5,
            bank: 2,
            ..Default::default()
        };
        assert_eq!(banks.inject(&mce, true), Ok(Raised::MachineCheck));
        assert_eq!(banks.read(MC0_CTL + 10, Writer::Guest), Ok(0x1000));
        assert_eq!(banks.read(MCG_STATUS, Writer::Guest), Ok(5));
        assert_eq!(banks.inject(&mce, true), Ok(Raised::TripleFault));
        let bad = kvm_x86_mce { bank: 10, ..mce };
        assert_eq!(banks.inject(&bad, true), Err(Errno::EINVAL));
    }

    #[test]
    fn set_up_checks_its_argument() {
        for bad in [0, 33, 1 | 1 << 40, 1 | 1 << 27] {
            assert_eq!(Banks::default().set_up(bad), Err(Errno::EINVAL), "{bad:#x}");
        }
    }

    #[test]
    fn errors_without_action_interrupt_where_the_guest_asks_for_it() {
        let mut banks = Banks::default();
        banks.set_up(0xa | CAP_CMCI).unwrap();
        let mce = kvm_x86_mce {
            status: STATUS_VALID | STATUS_UNCORRECTED,
            addr: 0x1000,
            bank: 2,
            ..Default::default()
        };
        assert_eq!(banks.inject(&mce, true), Ok(Raised::Nothing));
        assert_eq!(banks.read(MC0_CTL + 10, Writer::Guest), Ok(0x1000));
        let on = banks.write(MC0_CTL2 + 2, CTL2_INTERRUPT, Writer::Guest);
        assert!(on.is_ok());
        assert_eq!(banks.inject(&mce, true), Ok(Raised::CorrectedInterrupt));
    }

    #[test]
    fn a_guest_can_only_clear_a_status() {
        let mut banks = Banks::default();
        assert!(banks.write(MC0_CTL + 1, 1, Writer::Guest).is_err());
        assert!(banks.write(MC0_CTL + 1, 0, Writer::Guest).is_ok());
        assert!(banks.write(MC0_CTL + 1, 1, Writer::Monitor).is_ok());
    }
}
