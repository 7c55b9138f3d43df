//! Immediate operands.

use fastrand::Rng;
use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind};

use super::values;

/// The vector by which 32-bit programs enter Linux.
const LINUX_SYSTEM_CALL: u8 = 0x80;

/// Whether an operand of this kind is an immediate.
pub(super) fn is_immediate(kind: K) -> bool {
    matches!(
        kind,
        K::imm4_m2z
            | K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64
    )
}

/// Draws an immediate and sets it.
pub(super) fn set(instruction: &mut Instruction, index: u32, kind: K, rng: &mut Rng) {
    let value = values::integer(rng);
    match kind {
        K::imm8 => set_byte(instruction, index, value as u8),
        K::imm4_m2z => first_byte(instruction, index, value as u8 & 3),
        K::imm8_const_1 => first_byte(instruction, index, 1),
        K::imm8sex16 => {
            instruction.set_op_kind(index, OpKind::Immediate8to16);
            instruction.set_immediate8to16(i16::from(value as i8));
        }
        K::imm8sex32 => {
            instruction.set_op_kind(index, OpKind::Immediate8to32);
            instruction.set_immediate8to32(i32::from(value as i8));
        }
        K::imm8sex64 => {
            instruction.set_op_kind(index, OpKind::Immediate8to64);
            instruction.set_immediate8to64(i64::from(value as i8));
        }
        K::imm16 => {
            instruction.set_op_kind(index, OpKind::Immediate16);
            instruction.set_immediate16(value as u16);
        }
        K::imm32 => {
            instruction.set_op_kind(index, OpKind::Immediate32);
            instruction.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            instruction.set_op_kind(index, OpKind::Immediate32to64);
            instruction.set_immediate32to64(i64::from(value as i32));
        }
        _ => {
            instruction.set_op_kind(index, OpKind::Immediate64);
            instruction.set_immediate64(value);
        }
    }
}

/// The first immediate byte, or the second (`ENTER`, `EXTRQ`).
fn set_byte(instruction: &mut Instruction, index: u32, value: u8) {
    let before = (index > 0).then(|| instruction.op_kind(index - 1));
    match before {
        Some(OpKind::Immediate16) => second_byte(instruction, index, value & 0x1f),
        Some(OpKind::Immediate8) => second_byte(instruction, index, value),
        _ if instruction.code() == Code::Int_imm8 && value == LINUX_SYSTEM_CALL => {
            first_byte(instruction, index, value + 1);
        }
        _ => first_byte(instruction, index, value),
    }
}

fn first_byte(instruction: &mut Instruction, index: u32, value: u8) {
    instruction.set_op_kind(index, OpKind::Immediate8);
    instruction.set_immediate8(value);
}

fn second_byte(instruction: &mut Instruction, index: u32, value: u8) {
    instruction.set_op_kind(index, OpKind::Immediate8_2nd);
    instruction.set_immediate8_2nd(value);
}
