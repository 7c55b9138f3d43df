//! Where the guest's general registers are while translated code runs.

use iced_x86::Register;

use super::Block;
use crate::emit::asm::Width;
use crate::emit::{Mem, Reg};
use crate::engine::frame::{disp, frame_disp};

/// The place of a guest register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// In this host register.
    Host(Reg),
    /// In the frame.
    Frame(Mem),
}

/// The place of the guest register with this number.
pub(super) fn home(guest: u8) -> Home {
    match guest {
        1 => Home::Host(Reg::R9),
        4 => Home::Host(Reg::R10),
        9 | 10 | 11 | 15 => Home::Frame(slot(guest)),
        _ => Home::Host(Reg(guest)),
    }
}

/// The guest's rcx.
pub(super) const GUEST_RCX: Reg = Reg::R9;
/// The guest's rsp.
pub(super) const GUEST_RSP: Reg = Reg::R10;

/// Where the frame keeps a guest register (current only for those that live there).
pub(super) fn slot(guest: u8) -> Mem {
    Mem::base(Reg::RSP, frame_disp!(state.gpr) + 8 * i32::from(guest))
}

/// A scratch field of the frame.
pub(super) fn tmp(index: usize) -> Mem {
    use crate::engine::frame::Frame;
    Mem::base(
        Reg::RSP,
        disp(core::mem::offset_of!(Frame, tmp) + 8 * index),
    )
}

/// The number of a general register of any width; AH, CH, DH and BH are those of AL, CL, DL and BL.
#[inline]
pub(super) fn number(register: Register) -> u8 {
    let behind = |first: Register| (register as usize).wrapping_sub(first as usize);
    // The frequent ones without a call; iced has them in order.
    match (behind(Register::RAX), behind(Register::EAX)) {
        (number @ 0..16, _) | (_, number @ 0..16) => number as u8,
        _ => register.full_register().number() as u8,
    }
}

/// What the translator asks of a register operand.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RegisterFacts {
    /// Of a general register: the bit of its number.
    pub(super) mask: u16,
    /// It is AH, CH, DH or BH.
    pub(super) high: bool,
    /// The host's register of that name is not its home.
    pub(super) elsewhere: bool,
    /// It lives in the frame.
    pub(super) in_frame: bool,
}

impl RegisterFacts {
    /// Works them out.
    pub(super) fn of(register: Register) -> Self {
        if !register.is_gpr() {
            return Self::default();
        }
        let guest = number(register);
        Self {
            mask: 1 << guest,
            high: is_high_byte(register),
            elsewhere: home(guest) != Home::Host(Reg(guest)),
            in_frame: matches!(home(guest), Home::Frame(_)),
        }
    }
}

/// Whether it is AH, CH, DH or BH.
pub(super) fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

impl Block<'_> {
    /// A host register with the value of a guest register: its own, or `scratch`.
    pub(super) fn value_in(&mut self, guest: u8, scratch: Reg) -> Reg {
        match home(guest) {
            Home::Host(reg) => reg,
            Home::Frame(m) => {
                self.asm.load(Width::B64, scratch, m);
                scratch
            }
        }
    }

    /// Writes a host register to a guest register as an instruction of this width would.
    pub(super) fn assign(&mut self, width: Width, guest: u8, from: Reg) {
        match (home(guest), width) {
            (Home::Host(reg), _) => self.asm.mov(width, reg, from),
            (Home::Frame(m), Width::B32) => {
                // A 32-bit result clears the upper half.
                self.asm.mov(Width::B32, from, from);
                self.asm.store(Width::B64, m, from);
            }
            (Home::Frame(m), _) => self.asm.store(width, m, from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_iced_s() {
        for register in Register::values() {
            let expected = register.full_register().number() as u8;
            assert_eq!(number(register), expected, "{register:?}");
        }
    }
}
