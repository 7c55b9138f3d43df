//! Registers by the names that the decoder gives them.

use iced_x86::Register;
use x86::rflags;

use crate::CpuState;
use crate::state::{Segment, Segments};

/// A width of operands and stack slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Width {
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
    /// 64 bits.
    Qword,
}

impl Width {
    /// The width in bytes.
    pub(super) const fn bytes(self) -> u64 {
        match self {
            Self::Word => 2,
            Self::Dword => 4,
            Self::Qword => 8,
        }
    }

    /// The bits that a value of this width has.
    pub(super) const fn mask(self) -> u64 {
        match self {
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
            Self::Qword => u64::MAX,
        }
    }

    /// The width of so many bytes.
    pub(super) const fn of_bytes(bytes: usize) -> Self {
        match bytes {
            8 => Self::Qword,
            4 => Self::Dword,
            _ => Self::Word,
        }
    }
}

/// `old` with its low bits under `mask` from `new`.
pub(super) const fn merge(old: u64, new: u64, mask: u64) -> u64 {
    old & !mask | new & mask
}

impl CpuState {
    /// Reads a general register of any width.
    pub(super) fn register(&self, register: Register) -> u64 {
        let value = self.gpr[register.full_register().number()];
        match register.size() {
            1 if is_high_byte(register) => self.gpr[register.number() & 3] >> 8 & 0xff,
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Writes a general register; 32 bits clear the upper half.
    pub(super) fn set_register(&mut self, register: Register, value: u64) {
        if is_high_byte(register) {
            let slot = &mut self.gpr[register.number() & 3];
            *slot = merge(*slot, value << 8, 0xff00);
            return;
        }
        let slot = &mut self.gpr[register.full_register().number()];
        *slot = match register.size() {
            1 => merge(*slot, value, 0xff),
            2 => merge(*slot, value, 0xffff),
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Sets or clears flags.
    pub(super) fn put_flags(&mut self, mask: u64, value: u64) {
        self.rflags = merge(self.rflags, value, mask) | rflags::FIXED;
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

impl Segments {
    /// A segment register by the decoder's name; DS for what is none.
    pub(super) fn get(&self, register: Register) -> &Segment {
        match register {
            Register::ES => &self.es,
            Register::CS => &self.cs,
            Register::SS => &self.ss,
            Register::FS => &self.fs,
            Register::GS => &self.gs,
            _ => &self.ds,
        }
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, register: Register) -> &mut Segment {
        match register {
            Register::ES => &mut self.es,
            Register::CS => &mut self.cs,
            Register::SS => &mut self.ss,
            Register::FS => &mut self.fs,
            Register::GS => &mut self.gs,
            _ => &mut self.ds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_of_registers() {
        let mut state = CpuState::default();
        state.gpr[3] = 0x1122_3344_5566_7788;
        assert_eq!(state.register(Register::BH), 0x77);
        assert_eq!(state.register(Register::BL), 0x88);
        state.set_register(Register::BH, 0xaa);
        assert_eq!(state.gpr[3], 0x1122_3344_5566_aa88);
        state.set_register(Register::BX, 0xffff_0001);
        assert_eq!(state.gpr[3], 0x1122_3344_5566_0001);
        state.set_register(Register::EBX, 5);
        assert_eq!(state.gpr[3], 5);
        state.set_register(Register::R9W, 7);
        assert_eq!(state.register(Register::R9), 7);
        state.set_register(Register::SPL, 9);
        assert_eq!(state.gpr[4], 9);
    }
}
