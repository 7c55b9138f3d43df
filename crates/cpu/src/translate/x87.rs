//! Notes of which x87 instruction ran last, for the pointers that the guest can ask for (SDM 1, 8.1.8).
//!
//! Behind each x87 instruction but the control instructions, translated code stores the number of a
//! mark, and behind one with a memory operand that operand's offset. One store is enough for several
//! instructions in a row that can't fault; see `engine::x87` for the exception that is found in
//! between.

use iced_x86::Instruction;

use super::Block;
use super::address::segment_of;
use super::generic::has_memory;
use crate::emit::asm::Width;
use crate::emit::{Mem, Reg};
use crate::engine::frame::frame_disp;

/// What a number in the frame stands for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct X87Mark {
    /// Where the instruction's translation begins and ends, as offsets into the cache.
    pub(crate) host: u32,
    pub(crate) end: u32,
    pub(crate) rip: u64,
    /// FOP.
    pub(crate) opcode: u16,
    /// The number is not stored; the next instruction does it.
    pub(crate) deferred: bool,
}

/// `FNINIT`.
const FNINIT: u16 = 0x3e3;

/// The low three bits of the first byte, and the second, of an x87 instruction.
pub(super) fn opcode(bytes: &[u8]) -> Option<u16> {
    let mut rest = bytes;
    loop {
        match *rest {
            [first @ 0xd8..=0xdf, second, ..] => {
                return Some(u16::from(first & 7) << 8 | u16::from(second));
            }
            // Prefixes; where 0x40 to 0x4f are none, no other byte follows that looks like x87.
            [
                0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3,
                ..,
            ] => rest = &rest[1..],
            _ => return None,
        }
    }
}

/// Whether the instruction leaves the pointers alone.
fn is_control(opcode: u16) -> bool {
    let (first, second) = (opcode >> 8, opcode & 0xff);
    let operation = second >> 3 & 7;
    match first {
        1 => second < 0xc0 && operation >= 4,
        5 => second < 0xc0 && matches!(operation, 4 | 6 | 7),
        3 => (0xe0..=0xe4).contains(&second),
        7 => second == 0xe0,
        _ => false,
    }
}

/// Whether this is an instruction with register operands that sets the pointers.
pub(super) fn is_arithmetic(bytes: &[u8]) -> bool {
    opcode(bytes).is_some_and(|opcode| opcode & 0xff >= 0xc0 && !is_control(opcode))
}

/// Whether an instruction with a memory operand raises a waiting exception before all else: those of
/// the x87 but `FNSTCW` and `FNSTSW`, and those of MMX.
pub(super) fn waits(instruction: &Instruction, bytes: &[u8]) -> bool {
    match opcode(bytes) {
        Some(opcode) => !(matches!(opcode >> 8, 1 | 5) && opcode >> 3 & 7 == 7),
        None => instruction.op0_register().is_mm() || instruction.op1_register().is_mm(),
    }
}

impl Block<'_> {
    /// Behind the translation of an instruction that might be of the x87.
    pub(super) fn note_x87(&mut self, instruction: &Instruction, bytes: &[u8]) {
        let Some(opcode) = opcode(bytes) else {
            return;
        };
        if opcode == FNINIT {
            self.forget_x87();
        }
        if is_control(opcode) {
            return;
        }
        let data = has_memory(instruction);
        if data {
            let offset = self.offset(instruction);
            let place = Mem::base(Reg::RSP, frame_disp!(x87.pointers.dp));
            self.asm.store(Width::B64, place, offset);
            if !self.mode.is_64() {
                let segment = segment_of(instruction, self.mode);
                let place = Mem::base(Reg::RSP, frame_disp!(x87.segment));
                self.asm.store_imm(Width::B8, place, i32::from(segment));
            }
        }
        let deferred = self.x87_follows;
        if !deferred {
            let number = self.tables.x87.len() as i32 + 1;
            let place = Mem::base(Reg::RSP, frame_disp!(x87.mark));
            self.asm.store_imm(Width::B32, place, number);
        }
        let host = self
            .tables
            .marks
            .last()
            .map_or(self.start, |mark| mark.host);
        let mark = X87Mark {
            host,
            end: self.here(),
            rip: self.rip,
            opcode,
            deferred,
        };
        self.tables.x87.push(mark);
    }

    /// `FNINIT` clears the pointers.
    fn forget_x87(&mut self) {
        for place in [frame_disp!(x87.pointers.ip), frame_disp!(x87.pointers.dp)] {
            self.asm
                .store_imm(Width::B64, Mem::base(Reg::RSP, place), 0);
        }
        for place in [
            frame_disp!(x87.pointers.opcode),
            frame_disp!(x87.pointers.cs),
            frame_disp!(x87.pointers.ds),
        ] {
            self.asm
                .store_imm(Width::B16, Mem::base(Reg::RSP, place), 0);
        }
        self.asm
            .store_imm(Width::B32, Mem::base(Reg::RSP, frame_disp!(x87.mark)), 0);
        let place = Mem::base(Reg::RSP, frame_disp!(x87.segment));
        self.asm.store_imm(Width::B8, place, -1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sets_the_pointers() {
        assert!(is_arithmetic(&[0xd8, 0xc1])); // fadd
        assert!(is_arithmetic(&[0xd9, 0xd0])); // fnop
        assert!(!is_arithmetic(&[0xdf, 0xe0])); // fnstsw %ax
        assert!(!is_arithmetic(&[0xdb, 0xe3])); // fninit
        assert!(!is_arithmetic(&[0xdd, 0x07])); // fldl (%rdi): may fault
        assert_eq!(opcode(&[0x65, 0x48, 0xdd, 0x07]), Some(0x507));
        assert!(is_control(0x107 | 5 << 3)); // fldcw (%rdi)
        assert!(!is_control(0x507)); // fldl (%rdi)
    }
}
