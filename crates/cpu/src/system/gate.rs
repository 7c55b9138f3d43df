//! Call gates and the stacks that gates switch to (SDM 3A, 6.8.4, 6.8.5 and 7.12.1).

use addr::Gva;
use iced_x86::Register;
use x86::descriptor::{Descriptor, Gate, Selector, attributes, system_type};
use x86::tss::{tss16, tss32, tss64};
use x86::vector;

use super::far::Transfer;
use super::fault::{general, general_at, naming};
use super::registers::{Width, merge};
use super::segment::null_segment;
use super::stack::Stack;
use super::{Abort, Context, Effects, Privilege};
use crate::CpuState;
use crate::state::{Segment, gpr};

/// The stack that the TSS holds for an inner level: its segment, checked, and pointer.
pub(super) struct InnerStack {
    /// What SS becomes.
    pub(super) ss: Segment,
    /// The stack to push on.
    pub(super) stack: Stack,
}

impl Context<'_> {
    /// Reads `len` bytes of the TSS; `#TS(TR)` past its limit.
    fn read_tss(&mut self, offset: u32, len: u32) -> Result<u64, Abort> {
        let tr = self.state.segments.tr;
        if tr.unusable || offset + len - 1 > tr.limit {
            return Err(naming(vector::TS, Selector(tr.selector)));
        }
        let linear = tr.base.wrapping_add(u64::from(offset));
        let mask = if self.state.is_long_active() {
            u64::MAX
        } else {
            0xffff_ffff
        };
        let mut bytes = [0; 8];
        let bytes_read = &mut bytes[..len as usize];
        self.memory
            .read(Gva::new(linear & mask), bytes_read, Privilege::Implicit)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// RSP of the 64-bit TSS for a level.
    pub(super) fn long_stack_pointer(&mut self, level: u8) -> Result<u64, Abort> {
        self.read_tss(tss64::RSP0 + 8 * u32::from(level), 8)
    }

    /// RSP of the interrupt stack table, 1 to 7.
    pub(super) fn interrupt_stack_pointer(&mut self, ist: u8) -> Result<u64, Abort> {
        self.read_tss(tss64::IST1 + 8 * u32::from(ist - 1), 8)
    }

    /// SS:SP of a 16- or 32-bit TSS for a level, checked.
    pub(super) fn inner_stack(&mut self, level: u8) -> Result<InnerStack, Abort> {
        let kind = (self.state.segments.tr.attributes & attributes::TYPE) as u8;
        let is_wide = matches!(kind, system_type::TSS_AVAILABLE | system_type::TSS_BUSY);
        let (sp, selector) = if is_wide {
            let raw = self.read_tss(tss32::ESP0 + 8 * u32::from(level), 6)?;
            (raw & 0xffff_ffff, raw >> 32)
        } else {
            let raw = self.read_tss(tss16::SP0 + 4 * u32::from(level), 4)?;
            (raw & 0xffff, raw >> 16)
        };
        let selector = Selector(selector as u16);
        let ss = self.checked_inner_stack(selector, level)?;
        let stack = Stack::inner(ss, sp, level, selector.error_code());
        Ok(InnerStack { ss, stack })
    }

    fn checked_inner_stack(&mut self, selector: Selector, level: u8) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Err(naming(vector::TS, selector));
        }
        let descriptor = self.read_descriptor(selector, vector::TS)?;
        if selector.rpl() != level || descriptor.dpl() != level || !descriptor.is_writable() {
            return Err(naming(vector::TS, selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::SS, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    /// `CALL` or `JMP` through a call gate that CPL and RPL may use.
    pub(super) fn through_call_gate(
        &mut self,
        selector: Selector,
        gate: Gate,
        transfer: Transfer,
        next: u64,
    ) -> Result<(), Abort> {
        if !gate.descriptor().is_present() {
            return Err(naming(vector::NP, selector));
        }
        let code = self.checked_gate_code(gate.selector())?;
        let cpl = self.state.cpl();
        let inner = !code.is_conforming() && code.dpl() < cpl;
        if inner && transfer == Transfer::Jump {
            return Err(general_at(gate.selector()));
        }
        let long = self.state.is_long_active();
        let (width, offset) = match (gate.descriptor().kind(), long) {
            (_, true) => (Width::Qword, gate.offset64()),
            (system_type::CALL_GATE, _) => (Width::Dword, gate.offset32()),
            _ => (Width::Word, gate.offset16()),
        };
        if inner {
            return if long {
                self.call_inner_long(gate, code, next)
            } else {
                self.call_inner(gate, code, width, offset, next)
            };
        }
        self.call_same_level(gate, code, transfer, width, next)?;
        Ok(())
    }

    /// The code segment that a call gate names.
    fn checked_gate_code(&mut self, selector: Selector) -> Result<Descriptor, Abort> {
        if selector.is_null() {
            return Err(general());
        }
        let code = self.read_descriptor(selector, vector::GP)?;
        let long = self.state.is_long_active();
        let wrong_mode = long && (!code.is_long() || code.is_big());
        if !code.is_code() || code.dpl() > self.state.cpl() || wrong_mode {
            return Err(general_at(selector));
        }
        if !code.is_present() {
            return Err(naming(vector::NP, selector));
        }
        Ok(code)
    }

    fn call_same_level(
        &mut self,
        gate: Gate,
        code: Descriptor,
        transfer: Transfer,
        width: Width,
        next: u64,
    ) -> Result<(), Abort> {
        let offset = if width == Width::Qword {
            gate.offset64()
        } else {
            gate.offset32() & width.mask()
        };
        let mut stack = Stack::current(self.state);
        if transfer == Transfer::Call {
            let cs = u64::from(self.state.segments.cs.selector);
            stack.push_all(self, &[cs, next], width)?;
        }
        self.check_target(code, offset)?;
        let cpl = self.state.cpl();
        let cs = self.load_descriptor(gate.selector().with_rpl(cpl), code)?;
        stack.commit(self.state);
        self.put_code(cs, offset);
        Ok(())
    }

    fn call_inner(
        &mut self,
        gate: Gate,
        code: Descriptor,
        width: Width,
        offset: u64,
        next: u64,
    ) -> Result<(), Abort> {
        let level = code.dpl();
        let InnerStack { ss, mut stack } = self.inner_stack(level)?;
        let outer = Stack::current(self.state);
        let old_ss = u64::from(self.state.segments.ss.selector);
        let old_cs = u64::from(self.state.segments.cs.selector);
        stack.push_all(self, &[old_ss, outer.sp & width.mask()], width)?;
        for n in (0..u64::from(gate.parameters())).rev() {
            let parameter = outer.peek(self, n, width)?;
            stack.push(self, parameter, width)?;
        }
        stack.push_all(self, &[old_cs, next], width)?;
        self.check_target(code, offset)?;
        let cs = self.load_descriptor(gate.selector().with_rpl(level), code)?;
        self.state.segments.ss = ss;
        stack.commit(self.state);
        self.put_code(cs, offset);
        Ok(())
    }

    fn call_inner_long(&mut self, gate: Gate, code: Descriptor, next: u64) -> Result<(), Abort> {
        let level = code.dpl();
        let rsp = self.long_stack_pointer(level)?;
        let mut stack = Stack::flat(rsp, Privilege::Implicit);
        let old_ss = u64::from(self.state.segments.ss.selector);
        let old_cs = u64::from(self.state.segments.cs.selector);
        stack.push_frame(self, &[old_ss, self.state.gpr[gpr::RSP], old_cs, next])?;
        self.check_target(code, gate.offset64())?;
        let cs = self.load_descriptor(gate.selector().with_rpl(level), code)?;
        self.state.segments.ss = null_segment(Selector(u16::from(level)), level);
        stack.commit(self.state);
        self.put_code(cs, gate.offset64());
        Ok(())
    }

    /// Checks the stack segment that a return to an outer level, or `IRETQ`, goes back to.
    pub(super) fn checked_return_stack(
        &mut self,
        selector: Selector,
        level: u8,
        code: Descriptor,
    ) -> Result<Segment, Abort> {
        if selector.is_null() {
            let long = self.state.is_long_active() && code.is_long();
            if long && level < 3 && selector.rpl() == level {
                return Ok(null_segment(selector, level));
            }
            return Err(general());
        }
        let descriptor = self.read_descriptor(selector, vector::GP)?;
        if selector.rpl() != level || !descriptor.is_writable() || descriptor.dpl() != level {
            return Err(general_at(selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::SS, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    /// After a return to an outer level: data segments that it may not use become null.
    pub(super) fn drop_inner_segments(&mut self, level: u8) {
        for register in [Register::ES, Register::FS, Register::GS, Register::DS] {
            let segment = self.state.segments.get_mut(register);
            let kind = segment.attributes;
            let conforming = attributes::CODE | attributes::DOWN_CONFORMING;
            let dpl = (kind >> attributes::DPL_SHIFT) as u8 & 3;
            if !segment.unusable && kind & conforming != conforming && dpl < level {
                segment.selector = 0;
                segment.unusable = true;
            }
        }
        self.effects |= Effects::SEGMENTS;
    }
}

/// SS:RSP of an outer level: the width of the pointer is that of the new segments.
pub(super) fn put_outer_stack(state: &mut CpuState, ss: Segment, rsp: u64) {
    state.segments.ss = ss;
    let old = state.gpr[gpr::RSP];
    let mask = state.sp_mask();
    state.gpr[gpr::RSP] = if mask == 0xffff {
        merge(old, rsp, mask)
    } else {
        rsp & mask
    };
}
