//! PUSH, POP, CALL, RET, LEAVE: the stack pointer as an implicit operand.
//!
//! Everything that can fault comes before the stack pointer changes. In a run of pushes and pops that
//! share a check, it is not moved until something else may see it: [`Mark::stack`](super::Mark) tells
//! what is missing where the host traps.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::address::{SS, segment_of};
use super::generic::has_memory;
use super::registers::{GUEST_RSP, Home, home, number, tmp};
use super::window::{Role, is_plain_integer};
use super::{Block, Flow, SCRATCH, T0, Use};
use crate::emit::asm::Width;
use crate::emit::{Mem, Reg};

impl Block<'_> {
    /// The linear address of the stack at `SP + delta`.
    pub(super) fn stack_address(&mut self, delta: i32, size: u32, usage: Use) -> Reg {
        let offset = match self.mode.stack_bits() {
            64 if delta == 0 => return GUEST_RSP,
            64 => {
                self.asm.lea(Width::B64, T0, Mem::base(GUEST_RSP, delta));
                return T0;
            }
            32 => {
                self.asm.lea(Width::B32, T0, Mem::base(GUEST_RSP, delta));
                T0
            }
            _ => {
                self.asm.lea(Width::B32, T0, Mem::base(GUEST_RSP, delta));
                self.asm.movzx(Width::B16, T0, T0);
                T0
            }
        };
        self.add_segment(offset, SS, size, usage)
    }

    /// Before an instruction: moves the stack pointer where it has been put off, unless this is the
    /// next of a run, or has nothing to do with it.
    pub(super) fn settle_stack(&mut self, instruction: &Instruction, polls: bool) {
        if self.deferred == 0 && self.role == Role::None {
            self.defers = false;
            return;
        }
        let names_rsp = (0..instruction.op_count()).any(|i| {
            let register = instruction.op_register(i);
            register.is_gpr() && number(register) == number(Register::RSP)
        });
        let plain = !polls && !names_rsp && !has_memory(instruction);
        let moves = matches!(instruction.mnemonic(), Mnemonic::Push | Mnemonic::Pop)
            && instruction.stack_pointer_increment().abs() == 8;
        let apart = instruction.flow_control() == FlowControl::Next
            && !instruction.is_stack_instruction()
            && is_plain_integer(instruction.mnemonic());
        self.defers = plain && moves && self.role != Role::None;
        if !(self.defers && self.role == Role::Member || plain && apart) {
            self.move_deferred();
        }
    }

    /// Moves the stack pointer by what was put off.
    pub(super) fn move_deferred(&mut self) {
        let delta = std::mem::take(&mut self.deferred);
        if delta != 0 {
            self.asm
                .lea(Width::B64, GUEST_RSP, Mem::base(GUEST_RSP, delta));
        }
    }

    /// Adds to the stack pointer, as wide as it is.
    pub(super) fn move_stack(&mut self, delta: i32) {
        if self.defers {
            self.deferred += delta;
            return;
        }
        let m = Mem::base(GUEST_RSP, delta);
        match self.mode.stack_bits() {
            64 => self.asm.lea(Width::B64, GUEST_RSP, m),
            32 => self.asm.lea(Width::B32, GUEST_RSP, m),
            _ => self.asm.lea(Width::B16, GUEST_RSP, m),
        }
    }

    /// Reserves the place of a push; the stack pointer is not moved yet.
    pub(super) fn push_slot(&mut self, size: u32) -> Mem {
        let below = -(size as i32);
        if let Some(m) = self.shared(GUEST_RSP, below, size, Use::WriteOnly, SS) {
            return m;
        }
        let address = self.stack_address(below, size, Use::WriteOnly);
        self.access(address, size, Use::WriteOnly, SS)
    }

    /// The place of a pop.
    pub(super) fn pop_slot(&mut self, size: u32) -> Mem {
        if let Some(m) = self.shared(GUEST_RSP, 0, size, Use::Read, SS) {
            return m;
        }
        let address = self.stack_address(0, size, Use::Read);
        self.access(address, size, Use::Read, SS)
    }

    /// `PUSH` of a register, an immediate or memory.
    pub(super) fn push(&mut self, instruction: &Instruction) -> Flow {
        let size = instruction.stack_pointer_increment().unsigned_abs();
        let width = Width::of_bytes(size);
        if has_memory(instruction) {
            let segment = segment_of(instruction, self.mode);
            let address = self.linear(instruction, size, Use::Read);
            let m = self.access(address, size, Use::Read, segment);
            self.asm.load(width, SCRATCH, m);
            self.asm.store(Width::B64, tmp(0), SCRATCH);
            let place = self.push_slot(size);
            self.asm.load(Width::B64, SCRATCH, tmp(0));
            self.asm.store(width, place, SCRATCH);
        } else if instruction.op0_kind() == OpKind::Register {
            let guest = number(instruction.op0_register());
            let place = self.push_slot(size);
            let value = self.value_in(guest, SCRATCH);
            self.asm.store(width, place, value);
        } else {
            let place = self.push_slot(size);
            self.store_constant(width, place, instruction.immediate(0));
        }
        self.move_stack(-(size as i32));
        Flow::Next
    }

    /// Stores a constant of any width.
    pub(super) fn store_constant(&mut self, width: Width, place: Mem, value: u64) {
        if width == Width::B64 && i32::try_from(value as i64).is_err() {
            self.asm.mov_imm(SCRATCH, value);
            self.asm.store(width, place, SCRATCH);
        } else {
            self.asm.store_imm(width, place, value as i32);
        }
    }

    /// `POP` to a register or memory.
    pub(super) fn pop(&mut self, instruction: &Instruction) -> Flow {
        let size = instruction.stack_pointer_increment().unsigned_abs();
        let width = Width::of_bytes(size);
        if has_memory(instruction) {
            return self.pop_memory(instruction, size);
        }
        let guest = number(instruction.op0_register());
        let place = self.pop_slot(size);
        match home(guest) {
            // The value popped replaces the incremented pointer.
            Home::Host(GUEST_RSP) if width == Width::B16 => {
                self.asm.load(width, SCRATCH, place);
                self.move_stack(size as i32);
                self.asm.mov(width, GUEST_RSP, SCRATCH);
            }
            Home::Host(GUEST_RSP) => self.asm.load(width, GUEST_RSP, place),
            Home::Host(reg) => {
                self.asm.load(width, reg, place);
                self.move_stack(size as i32);
            }
            Home::Frame(_) => {
                self.asm.load(width, SCRATCH, place);
                self.assign(width, guest, SCRATCH);
                self.move_stack(size as i32);
            }
        }
        Flow::Next
    }

    /// `POP` to memory: an address that uses the stack pointer sees it incremented.
    fn pop_memory(&mut self, instruction: &Instruction, size: u32) -> Flow {
        let width = Width::of_bytes(size);
        let place = self.pop_slot(size);
        self.asm.load(width, SCRATCH, place);
        self.asm.store(Width::B64, tmp(0), SCRATCH);
        let mut later = *instruction;
        if matches!(instruction.memory_base(), Register::RSP | Register::ESP) {
            let moved = instruction
                .memory_displacement64()
                .wrapping_add(u64::from(size));
            later.set_memory_displacement64(moved);
        }
        let segment = segment_of(instruction, self.mode);
        let address = self.linear(&later, size, Use::WriteOnly);
        let m = self.access(address, size, Use::WriteOnly, segment);
        self.asm.load(Width::B64, SCRATCH, tmp(0));
        self.asm.store(width, m, SCRATCH);
        self.move_stack(size as i32);
        Flow::Next
    }

    /// `LEAVE`: SP from BP, then pop BP.
    pub(super) fn leave_frame(&mut self, instruction: &Instruction) -> Flow {
        let size = match instruction.mnemonic() {
            Mnemonic::Leave if self.mode.is_64() => {
                if instruction.code() == iced_x86::Code::Leavew {
                    2
                } else {
                    8
                }
            }
            _ if instruction.code() == iced_x86::Code::Leavew => 2,
            _ => 4,
        };
        let width = Width::of_bytes(size);
        let bits = self.mode.stack_bits();
        let address = match bits {
            64 => Reg::RBP,
            32 => {
                self.asm.lea(Width::B32, T0, Mem::base(Reg::RBP, 0));
                self.add_segment(T0, SS, size, Use::Read)
            }
            _ => {
                self.asm.movzx(Width::B16, T0, Reg::RBP);
                self.add_segment(T0, SS, size, Use::Read)
            }
        };
        let place = self.access(address, size, Use::Read, SS);
        self.asm.load(width, SCRATCH, place);
        let stack = Width::of_bytes(bits / 8);
        let m = Mem::base(Reg::RBP, size as i32);
        self.asm.lea(stack, GUEST_RSP, m);
        self.asm.mov(width, Reg::RBP, SCRATCH);
        Flow::Next
    }
}
