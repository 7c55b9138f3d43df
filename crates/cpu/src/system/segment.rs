//! Loading data and stack segments: `MOV`, `POP`, `LDS` and its family (SDM 2, `MOV`; SDM 3A, 6.6
//! and 6.7), and what they look like stored.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::descriptor::{Selector, attributes};
use x86::vector;

use super::fault::{general, general_at, naming, undefined};
use super::operand::{Want, width_of_stack};
use super::registers::Width;
use super::stack::Stack;
use super::table::{load_real, require_present};
use super::{Abort, Context, Effects, Next};
use crate::state::Segment;

/// A segment register after a null selector was loaded.
pub(super) fn null_segment(selector: Selector, cpl: u8) -> Segment {
    Segment {
        selector: selector.0,
        attributes: u16::from(cpl) << attributes::DPL_SHIFT,
        unusable: true,
        ..Segment::default()
    }
}

impl Context<'_> {
    /// What a segment register holds after this selector is loaded, checked; nothing is changed but
    /// the accessed bit.
    pub(super) fn checked_segment(
        &mut self,
        register: Register,
        selector: Selector,
    ) -> Result<Segment, Abort> {
        if self.state.has_real_segments() {
            let mut segment = *self.state.segments.get(register);
            load_real(&mut segment, selector.0);
            Ok(segment)
        } else if register == Register::SS {
            let cpl = self.state.cpl();
            self.checked_stack_segment(selector, cpl)
        } else {
            self.checked_data_segment(selector)
        }
    }

    fn checked_stack_segment(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Abort> {
        if selector.is_null() {
            if self.state.is_64bit() && cpl < 3 && selector.rpl() == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return Err(general());
        }
        let descriptor = self.read_descriptor(selector, vector::GP)?;
        if selector.rpl() != cpl || !descriptor.is_writable() || descriptor.dpl() != cpl {
            return Err(general_at(selector));
        }
        require_present(selector, descriptor, vector::SS)?;
        self.load_descriptor(selector, descriptor)
    }

    fn checked_data_segment(&mut self, selector: Selector) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        let descriptor = self.read_descriptor(selector, vector::GP)?;
        let privileged = !descriptor.is_conforming()
            && (selector.rpl() > descriptor.dpl() || self.state.cpl() > descriptor.dpl());
        if descriptor.is_system() || !descriptor.is_readable() || privileged {
            return Err(general_at(selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    /// Puts a segment into its register.
    fn put_segment(&mut self, register: Register, segment: Segment) {
        *self.state.segments.get_mut(register) = segment;
        self.effects |= Effects::SEGMENTS | Effects::MODE;
    }

    /// `MOV` to or from a segment register.
    pub(super) fn mov_segment(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let next = self.next_rip(instruction);
        if instruction.op0_kind() == OpKind::Register
            && instruction.op0_register().is_segment_register()
        {
            let register = instruction.op0_register();
            if register == Register::CS {
                return Err(undefined());
            }
            let selector = Selector(self.read_operand(instruction, 1, 2)? as u16);
            let segment = self.checked_segment(register, selector)?;
            self.put_segment(register, segment);
            if register == Register::SS {
                self.begin_mov_ss_shadow();
            }
        } else {
            let selector = self.state.segments.get(instruction.op1_register()).selector;
            self.write_operand(instruction, u64::from(selector), 2)?;
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `POP` and `PUSH` of a segment register.
    pub(super) fn stack_segment(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let next = self.next_rip(instruction);
        let width = width_of_stack(instruction);
        let register = instruction.op0_register();
        let mut stack = Stack::current(self.state);
        if instruction.mnemonic() == Mnemonic::Push {
            let selector = self.state.segments.get(register).selector;
            stack.push_selector(self, selector, width)?;
            stack.commit(self.state);
        } else {
            // All of the slot is read, as AMD's CPUs and older ones do it.
            let selector = stack.peek(self, 0, width)? as u16;
            stack.drop_bytes(width.bytes());
            let segment = self.checked_segment(register, Selector(selector))?;
            stack.commit(self.state);
            self.put_segment(register, segment);
            if register == Register::SS {
                self.begin_mov_ss_shadow();
            }
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `LDS`, `LES`, `LFS`, `LGS`, `LSS`: a far pointer into a segment register and a general one.
    pub(super) fn load_far_pointer(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if instruction.op1_kind() != OpKind::Memory {
            return Err(undefined());
        }
        let next = self.next_rip(instruction);
        let register = match instruction.mnemonic() {
            Mnemonic::Lds => Register::DS,
            Mnemonic::Les => Register::ES,
            Mnemonic::Lfs => Register::FS,
            Mnemonic::Lgs => Register::GS,
            _ => Register::SS,
        };
        let width = Width::of_bytes(instruction.op0_register().size());
        let (offset, selector) = self.read_far_pointer(instruction, 1, width)?;
        let segment = self.checked_segment(register, selector)?;
        self.put_segment(register, segment);
        self.state.set_register(instruction.op0_register(), offset);
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// Offset and selector of a far pointer in memory.
    pub(super) fn read_far_pointer(
        &mut self,
        instruction: &Instruction,
        n: u32,
        width: Width,
    ) -> Result<(u64, Selector), Abort> {
        debug_assert_eq!(instruction.op_kind(n), OpKind::Memory);
        let bytes = width.bytes();
        let gva = self.operand_address(instruction, 0, bytes, Want::Read)?;
        let offset = self.load(gva, bytes)?;
        let high = self.operand_address(instruction, bytes, 2, Want::Read)?;
        let selector = self.load(high, 2)?;
        Ok((offset, Selector(selector as u16)))
    }
}
