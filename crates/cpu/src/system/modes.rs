//! In which mode the CPU is, as its state says.

use x86::control::{Cr0, Cr4, Efer};
use x86::descriptor::attributes;
use x86::rflags;

use super::Privilege;
use crate::CpuState;

/// The operating mode (SDM 1, 3.1; SDM 3A, 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CR0.PE clear.
    Real,
    /// RFLAGS.VM set.
    Virtual8086,
    /// Protected mode, 16- or 32-bit.
    Protected,
    /// Long mode with CS.L clear.
    Compatibility,
    /// Long mode with CS.L set.
    Long,
}

impl CpuState {
    /// Whether all these bits are set in CR0.
    pub fn cr0_has(&self, bits: Cr0) -> bool {
        self.cr0 & bits.bits() == bits.bits()
    }

    /// Whether all these bits are set in CR4.
    pub fn cr4_has(&self, bits: Cr4) -> bool {
        self.cr4 & bits.bits() == bits.bits()
    }

    /// Whether all these bits are set in EFER.
    pub fn efer_has(&self, bits: Efer) -> bool {
        self.msrs.efer & bits.bits() == bits.bits()
    }

    /// Whether all these bits are set in RFLAGS.
    pub fn flags_have(&self, bits: u64) -> bool {
        self.rflags & bits == bits
    }

    /// Whether CR0.PE is set.
    pub fn is_protected(&self) -> bool {
        self.cr0_has(Cr0::PE)
    }

    /// Whether long mode is active, in 64-bit or compatibility mode.
    pub fn is_long_active(&self) -> bool {
        self.efer_has(Efer::LMA)
    }

    /// Whether this is 64-bit mode.
    pub fn is_64bit(&self) -> bool {
        self.is_long_active() && self.segments.cs.attributes & attributes::L != 0
    }

    /// The operating mode.
    pub fn mode(&self) -> Mode {
        if !self.is_protected() {
            Mode::Real
        } else if self.is_64bit() {
            Mode::Long
        } else if self.is_long_active() {
            Mode::Compatibility
        } else if self.flags_have(rflags::VM) {
            Mode::Virtual8086
        } else {
            Mode::Protected
        }
    }

    /// Whether segment registers are loaded without descriptors: real or virtual-8086 mode.
    pub fn has_real_segments(&self) -> bool {
        matches!(self.mode(), Mode::Real | Mode::Virtual8086)
    }

    /// Current privilege level: the DPL of SS, which every transfer keeps equal to it.
    pub fn cpl(&self) -> u8 {
        if !self.is_protected() {
            0
        } else if self.mode() == Mode::Virtual8086 {
            3
        } else {
            (self.segments.ss.attributes >> attributes::DPL_SHIFT) as u8 & 3
        }
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.rflags >> rflags::IOPL_SHIFT) as u8 & 3
    }

    /// With whose rights the guest's own loads and stores are made.
    pub fn explicit_privilege(&self) -> Privilege {
        self.privilege_at(self.cpl())
    }

    /// With whose rights loads and stores are made at this CPL.
    pub fn privilege_at(&self, cpl: u8) -> Privilege {
        if cpl == 3 {
            Privilege::User
        } else if self.flags_have(rflags::AC) {
            Privilege::SupervisorAcSet
        } else {
            Privilege::Supervisor
        }
    }

    /// Bits of an instruction pointer in the present code segment.
    pub fn ip_mask(&self) -> u64 {
        if self.is_64bit() {
            u64::MAX
        } else if self.segments.cs.attributes & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Bits of a stack pointer in the present stack segment.
    pub fn sp_mask(&self) -> u64 {
        if self.is_64bit() {
            u64::MAX
        } else if self.segments.ss.attributes & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Whether a linear address is canonical: a sign-extended 48- or 57-bit number.
    pub fn is_canonical(&self, linear: u64) -> bool {
        self.sign_extended(linear) == linear
    }

    /// The canonical address with the same lower 48 or 57 bits.
    pub(super) fn sign_extended(&self, linear: u64) -> u64 {
        let width = if self.cr4_has(Cr4::LA57) { 57 } else { 48 };
        let shift = 64 - width;
        ((linear as i64) << shift >> shift) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_states() {
        let mut state = CpuState::default();
        assert_eq!(state.mode(), Mode::Real);
        state.cr0 = Cr0::PE.bits();
        assert_eq!(state.mode(), Mode::Protected);
        state.rflags = rflags::VM;
        assert_eq!((state.mode(), state.cpl()), (Mode::Virtual8086, 3));
        state.rflags = 0;
        state.msrs.efer = Efer::LMA.bits();
        assert_eq!(state.mode(), Mode::Compatibility);
        state.segments.cs.attributes = attributes::L;
        assert_eq!(state.mode(), Mode::Long);
    }

    #[test]
    fn canonical_addresses() {
        let mut state = CpuState::default();
        assert!(state.is_canonical(0x7fff_ffff_ffff));
        assert!(!state.is_canonical(0x8000_0000_0000));
        assert!(state.is_canonical(0xffff_8000_0000_0000));
        state.cr4 = Cr4::LA57.bits();
        assert!(state.is_canonical(0x8000_0000_0000));
    }
}
