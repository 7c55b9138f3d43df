//! Far jumps, calls and returns (SDM 2, `JMP`, `CALL`, `RET`; SDM 3A, 6.8).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86::descriptor::{Descriptor, Gate, Selector, system_type};
use x86::vector;

use super::fault::{general, general_at, naming, undefined};
use super::gate::put_outer_stack;
use super::offer::Vendor;
use super::operand::width_of_stack;
use super::registers::Width;
use super::stack::Stack;
use super::table::load_real;
use super::task::Source;
use super::{Abort, Context, Effects, Next};
use crate::state::{Segment, gpr};

/// Whether a far transfer comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    Jump,
    Call,
}

/// A far pointer with the width of its instruction.
#[derive(Clone, Copy)]
struct Target {
    selector: Selector,
    offset: u64,
    width: Width,
}

impl Context<'_> {
    /// Far `JMP` and `CALL`.
    pub(super) fn far_transfer(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let transfer = if instruction.mnemonic() == Mnemonic::Call {
            Transfer::Call
        } else {
            Transfer::Jump
        };
        let target = self.far_target(instruction)?;
        let next = self.next_rip(instruction);
        if self.state.has_real_segments() {
            self.far_real(target, transfer, next)?;
        } else {
            self.far_protected(target, transfer, next)?;
        }
        self.effects |= Effects::MODE | Effects::SEGMENTS | Effects::JUMP;
        Ok(Next::Jump)
    }

    fn far_target(&mut self, instruction: &Instruction) -> Result<Target, Abort> {
        let (offset, width) = match instruction.op0_kind() {
            OpKind::FarBranch16 => (u64::from(instruction.far_branch16()), Width::Word),
            OpKind::FarBranch32 => (u64::from(instruction.far_branch32()), Width::Dword),
            _ => return self.indirect_target(instruction),
        };
        let selector = Selector(instruction.far_branch_selector());
        Ok(Target {
            selector,
            offset,
            width,
        })
    }

    fn indirect_target(&mut self, instruction: &Instruction) -> Result<Target, Abort> {
        if instruction.op0_kind() != OpKind::Memory {
            return Err(undefined());
        }
        let width = match instruction.code() {
            Code::Jmp_m1664 | Code::Call_m1664 => Width::Qword,
            Code::Jmp_m1632 | Code::Call_m1632 => Width::Dword,
            _ => Width::Word,
        };
        let (offset, selector) = self.read_far_pointer(instruction, 0, width)?;
        Ok(Target {
            selector,
            offset,
            width,
        })
    }

    fn far_real(&mut self, target: Target, transfer: Transfer, next: u64) -> Result<(), Abort> {
        if target.offset > u64::from(self.state.segments.cs.limit) {
            return Err(general());
        }
        if transfer == Transfer::Call {
            let mut stack = Stack::current(self.state);
            let cs = u64::from(self.state.segments.cs.selector);
            stack.push_all(self, &[cs, next], target.width)?;
            stack.commit(self.state);
        }
        load_real(&mut self.state.segments.cs, target.selector.0);
        self.state.rip = target.offset;
        Ok(())
    }

    fn far_protected(
        &mut self,
        target: Target,
        transfer: Transfer,
        next: u64,
    ) -> Result<(), Abort> {
        if target.selector.is_null() {
            return Err(general());
        }
        let descriptor = self.read_descriptor(target.selector, vector::GP)?;
        if descriptor.is_code() {
            return self.far_to_code(target, descriptor, transfer, next);
        }
        if !descriptor.is_system() {
            return Err(general_at(target.selector));
        }
        self.far_to_system(target.selector, descriptor, transfer, next)
    }

    fn far_to_code(
        &mut self,
        target: Target,
        descriptor: Descriptor,
        transfer: Transfer,
        next: u64,
    ) -> Result<(), Abort> {
        let selector = target.selector;
        let cpl = self.state.cpl();
        let allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            selector.rpl() <= cpl && descriptor.dpl() == cpl
        };
        if !allowed || self.is_long_and_big(descriptor) {
            return Err(general_at(selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        let stack = match transfer {
            Transfer::Jump => None,
            Transfer::Call => Some(self.push_return(target.width, next, descriptor)?),
        };
        self.check_target(descriptor, target.offset)?;
        let cs = self.load_descriptor(selector.with_rpl(cpl), descriptor)?;
        if let Some(stack) = stack {
            stack.commit(self.state);
        }
        self.put_code(cs, target.offset);
        Ok(())
    }

    /// CS.L and CS.D both set is reserved in long mode.
    pub(super) fn is_long_and_big(&self, descriptor: Descriptor) -> bool {
        self.state.is_long_active() && descriptor.is_long() && descriptor.is_big()
    }

    /// AMD's CPUs push to the stack as the new code sees it.
    fn push_return(&mut self, width: Width, next: u64, code: Descriptor) -> Result<Stack, Abort> {
        let mut stack = Stack::current(self.state);
        if self.offer.vendor == Vendor::Amd && self.state.is_64bit() && !code.is_long() {
            stack.narrow();
        }
        let cs = u64::from(self.state.segments.cs.selector);
        stack.push_all(self, &[cs, next], width)?;
        Ok(stack)
    }

    /// `#GP(0)` unless the offset lies in the code segment.
    pub(super) fn check_target(&self, code: Descriptor, offset: u64) -> Result<(), Abort> {
        let legal = if self.state.is_long_active() && code.is_long() {
            self.state.is_canonical(offset)
        } else {
            offset <= u64::from(code.limit())
        };
        if legal { Ok(()) } else { Err(general()) }
    }

    /// CS and RIP of a transfer that can't fail any more.
    pub(super) fn put_code(&mut self, cs: Segment, rip: u64) {
        self.state.segments.cs = cs;
        self.state.rip = rip;
        self.effects |= Effects::MODE | Effects::SEGMENTS | Effects::JUMP;
    }

    fn far_to_system(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
        transfer: Transfer,
        next: u64,
    ) -> Result<(), Abort> {
        use system_type::{
            CALL_GATE, CALL_GATE16, TASK_GATE, TSS_AVAILABLE, TSS_BUSY, TSS16_AVAILABLE, TSS16_BUSY,
        };
        let long = self.state.is_long_active();
        let kind = descriptor.kind();
        let known = match kind {
            CALL_GATE => true,
            CALL_GATE16 | TASK_GATE | TSS_AVAILABLE | TSS_BUSY | TSS16_AVAILABLE | TSS16_BUSY => {
                !long
            }
            _ => false,
        };
        let visible = descriptor.dpl() >= self.state.cpl().max(selector.rpl());
        if !known || !visible {
            return Err(general_at(selector));
        }
        let gate = if long {
            self.read_wide_descriptor(selector, vector::GP)?
        } else {
            Gate {
                low: descriptor.0,
                high: 0,
            }
        };
        match kind {
            CALL_GATE | CALL_GATE16 => self.through_call_gate(selector, gate, transfer, next),
            TASK_GATE => {
                if !descriptor.is_present() {
                    return Err(naming(vector::NP, selector));
                }
                self.switch_task(gate.selector(), Source::from(transfer), next)
            }
            _ => self.switch_task(selector, Source::from(transfer), next),
        }
    }

    /// Far `RET`.
    pub(super) fn far_return(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let width = far_return_width(instruction);
        let release = if instruction.op0_kind() == OpKind::Immediate16 {
            u64::from(instruction.immediate16())
        } else {
            0
        };
        let mut stack = Stack::current(self.state);
        if self.offer.vendor == Vendor::Amd {
            self.try_far_return(stack, release, width)?;
        }
        let rip = stack.pop(self, width)?;
        let selector = Selector(stack.pop(self, width)? as u16);
        if self.state.has_real_segments() {
            if rip > u64::from(self.state.segments.cs.limit) {
                return Err(general());
            }
            load_real(&mut self.state.segments.cs, selector.0);
            self.state.rip = rip;
            stack.drop_bytes(release);
            stack.commit(self.state);
        } else {
            self.return_protected(stack, selector, rip, release, width)?;
        }
        self.effects |= Effects::MODE | Effects::SEGMENTS | Effects::JUMP;
        Ok(Next::Jump)
    }

    /// The reads of AMD's CPUs, for the order of their faults: selectors come before pointers, and the
    /// outer stack's come before any check of the code segment (APM 3, `RET` (far)).
    fn try_far_return(
        &mut self,
        mut stack: Stack,
        release: u64,
        width: Width,
    ) -> Result<(), Abort> {
        let selector = Selector(stack.peek(self, 1, width)? as u16);
        stack.peek(self, 0, width)?;
        if !self.state.has_real_segments() && selector.rpl() != self.state.cpl() {
            stack.drop_bytes(2 * width.bytes() + release);
            stack.peek(self, 1, width)?;
            stack.peek(self, 0, width)?;
        }
        Ok(())
    }

    fn return_protected(
        &mut self,
        mut stack: Stack,
        selector: Selector,
        rip: u64,
        release: u64,
        width: Width,
    ) -> Result<(), Abort> {
        let descriptor = self.checked_return_code(selector)?;
        if selector.rpl() == self.state.cpl() {
            if self.offer.vendor == Vendor::Amd
                && descriptor.is_long()
                && self.state.is_long_active()
            {
                // AMD's CPUs release from the stack as the code at the target sees it.
                stack.sp = stack.sp.wrapping_add(release);
            } else {
                stack.drop_bytes(release);
            }
            self.check_target(descriptor, rip)?;
            let cs = self.load_descriptor(selector, descriptor)?;
            self.put_code(cs, rip);
            stack.commit(self.state);
            return Ok(());
        }
        stack.drop_bytes(release);
        let rsp = stack.pop(self, width)?;
        let ss_selector = Selector(stack.pop(self, width)? as u16);
        let ss = self.checked_return_stack(ss_selector, selector.rpl(), descriptor)?;
        self.check_target(descriptor, rip)?;
        let cs = self.load_descriptor(selector, descriptor)?;
        self.put_code(cs, rip);
        let rsp = rsp & width.mask();
        put_outer_stack(self.state, ss, rsp);
        let old = self.state.gpr[gpr::RSP];
        let mask = self.state.sp_mask();
        self.state.gpr[gpr::RSP] = super::registers::merge(old, old.wrapping_add(release), mask);
        self.drop_inner_segments(selector.rpl());
        Ok(())
    }

    /// Checks the code segment that `RET` or `IRET` goes back to.
    pub(super) fn checked_return_code(&mut self, selector: Selector) -> Result<Descriptor, Abort> {
        if selector.is_null() {
            return Err(general());
        }
        let descriptor = self.read_descriptor(selector, vector::GP)?;
        let rpl = selector.rpl();
        let level = if descriptor.is_conforming() {
            descriptor.dpl() <= rpl
        } else {
            descriptor.dpl() == rpl
        };
        let legal = descriptor.is_code() && rpl >= self.state.cpl() && level;
        if !legal || self.is_long_and_big(descriptor) {
            return Err(general_at(selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        Ok(descriptor)
    }
}

/// The slots of a far return: not those that the stack pointer moves by, which count the immediate.
fn far_return_width(instruction: &Instruction) -> Width {
    match instruction.code() {
        Code::Retfq | Code::Retfq_imm16 => Width::Qword,
        Code::Retfd | Code::Retfd_imm16 => Width::Dword,
        Code::Retfw | Code::Retfw_imm16 => Width::Word,
        _ => width_of_stack(instruction),
    }
}
