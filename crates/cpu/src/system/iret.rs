//! `IRET` in every mode (SDM 2, `IRET`; SDM 3A, 7.12.1, 7.14 and 21.2.1).

use iced_x86::{Instruction, Mnemonic};
use x86::control::Cr4;
use x86::descriptor::{Descriptor, Selector};
use x86::rflags;
use x86::vector;

use super::fault::{general, naming};
use super::gate::put_outer_stack;
use super::modes::Mode;
use super::offer::Vendor;
use super::registers::Width;
use super::stack::Stack;
use super::table::{load_real, virtual8086_segment};
use super::task::Source;
use super::{Abort, Context, Effects, Next, Privilege};
use crate::state::gpr;

/// The three slots that every `IRET` pops.
struct Frame {
    rip: u64,
    cs: Selector,
    flags: u64,
}

impl Context<'_> {
    /// `IRET`, `IRETD`, `IRETQ`.
    pub(super) fn iret(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let width = match instruction.mnemonic() {
            Mnemonic::Iretq => Width::Qword,
            Mnemonic::Iretd => Width::Dword,
            _ => Width::Word,
        };
        match self.state.mode() {
            Mode::Real => self.iret_real(width)?,
            Mode::Virtual8086 => self.iret_virtual8086(width)?,
            Mode::Protected => self.iret_protected(width)?,
            Mode::Long if width == Width::Qword => self.iretq()?,
            Mode::Long | Mode::Compatibility => self.iret_long(width)?,
        }
        if self.state.events.nmi_masked {
            self.state.events.nmi_masked = false;
            self.effects |= Effects::EVENTS;
        }
        self.effects |= Effects::MODE | Effects::SEGMENTS | Effects::JUMP | Effects::RF_LOADED;
        Ok(Next::Jump)
    }

    fn pop_frame(&mut self, stack: &mut Stack, width: Width) -> Result<Frame, Abort> {
        if self.offer.vendor == Vendor::Amd {
            // In this order AMD's CPUs find faults.
            for slot in [2, 1] {
                stack.peek(self, slot, width)?;
            }
        }
        let rip = stack.pop(self, width)?;
        let cs = Selector(stack.pop(self, width)? as u16);
        let flags = stack.pop(self, width)?;
        Ok(Frame { rip, cs, flags })
    }

    /// RFLAGS of the frame, as far as the level that returns may set them.
    fn put_frame_flags(&mut self, image: u64, width: Width, cpl: u8) {
        let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        if width != Width::Word {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if cpl <= self.state.iopl() {
            mask |= rflags::IF;
        }
        if cpl == 0 {
            mask |= rflags::IOPL;
            if width != Width::Word {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        let old = self.state.rflags;
        self.state.put_flags(mask, image);
        if width == Width::Word {
            self.state.rflags &= !rflags::RF;
        }
        self.note_flags(old);
    }

    fn iret_real(&mut self, width: Width) -> Result<(), Abort> {
        let mut stack = Stack::current(self.state);
        let frame = self.pop_frame(&mut stack, width)?;
        if frame.rip > u64::from(self.state.segments.cs.limit) {
            return Err(general());
        }
        load_real(&mut self.state.segments.cs, frame.cs.0);
        self.state.rip = frame.rip;
        stack.commit(self.state);
        let old = self.state.rflags;
        let kept = rflags::VM | rflags::VIF | rflags::VIP;
        self.state
            .put_flags(width.mask() & rflags::ALL & !kept, frame.flags);
        if width == Width::Word {
            self.state.rflags &= !rflags::RF;
        }
        self.note_flags(old);
        Ok(())
    }

    fn iret_virtual8086(&mut self, width: Width) -> Result<(), Abort> {
        let restricted = self.state.iopl() < 3;
        if restricted && (width != Width::Word || !self.state.cr4_has(Cr4::VME)) {
            return Err(general());
        }
        let mut stack = Stack::current(self.state);
        let frame = self.pop_frame(&mut stack, width)?;
        if frame.rip > u64::from(self.state.segments.cs.limit) {
            return Err(general());
        }
        let old = self.state.rflags;
        if restricted {
            self.set_virtual_flags(frame.flags)?;
        } else {
            self.put_frame_flags(frame.flags, width, 3);
        }
        self.note_flags(old);
        load_real(&mut self.state.segments.cs, frame.cs.0);
        self.state.rip = frame.rip;
        stack.commit(self.state);
        Ok(())
    }

    fn iret_protected(&mut self, width: Width) -> Result<(), Abort> {
        if self.state.flags_have(rflags::NT) {
            return self.iret_task();
        }
        let mut stack = Stack::current(self.state);
        let frame = self.pop_frame(&mut stack, width)?;
        let cpl = self.state.cpl();
        if frame.flags & rflags::VM != 0 && width == Width::Dword && cpl == 0 {
            return self.iret_to_virtual8086(stack, &frame);
        }
        let code = self.checked_return_code(frame.cs)?;
        if frame.cs.rpl() > cpl {
            return self.iret_outer(stack, &frame, code, width);
        }
        self.check_target(code, frame.rip)?;
        let cs = self.load_descriptor(frame.cs, code)?;
        self.put_code(cs, frame.rip);
        stack.commit(self.state);
        self.put_frame_flags(frame.flags, width, cpl);
        Ok(())
    }

    fn iret_task(&mut self) -> Result<(), Abort> {
        let base = self.state.segments.tr.base;
        let mut link = [0; 2];
        self.memory
            .read(addr::Gva::new(base), &mut link, Privilege::Implicit)?;
        let selector = Selector(u16::from_le_bytes(link));
        if selector.is_local() {
            return Err(naming(vector::TS, selector));
        }
        let rip = self.state.rip;
        self.switch_task(selector, Source::Iret, rip)
    }

    /// To virtual-8086 mode: nine slots in all.
    fn iret_to_virtual8086(&mut self, mut stack: Stack, frame: &Frame) -> Result<(), Abort> {
        let mut slots = [0; 6];
        for slot in &mut slots {
            *slot = stack.pop(self, Width::Dword)?;
        }
        if frame.rip > 0xffff {
            return Err(general());
        }
        let [rsp, ss, es, ds, fs, gs] = slots;
        let segments = &mut self.state.segments;
        segments.cs = virtual8086_segment(frame.cs.0);
        segments.ss = virtual8086_segment(ss as u16);
        segments.es = virtual8086_segment(es as u16);
        segments.ds = virtual8086_segment(ds as u16);
        segments.fs = virtual8086_segment(fs as u16);
        segments.gs = virtual8086_segment(gs as u16);
        self.state.rip = frame.rip;
        self.state.gpr[gpr::RSP] = rsp;
        let old = self.state.rflags;
        self.state.put_flags(rflags::ALL, frame.flags);
        self.note_flags(old);
        Ok(())
    }

    fn iret_outer(
        &mut self,
        mut stack: Stack,
        frame: &Frame,
        code: Descriptor,
        width: Width,
    ) -> Result<(), Abort> {
        let rsp = stack.pop(self, width)?;
        let ss = Selector(stack.pop(self, width)? as u16);
        self.finish_with_stack(frame, code, rsp, ss, width)
    }

    /// `IRET` of 16 or 32 bits in long mode: SS:RSP is popped when the level changes.
    fn iret_long(&mut self, width: Width) -> Result<(), Abort> {
        if self.state.flags_have(rflags::NT) {
            return Err(general());
        }
        let mut stack = Stack::current(self.state);
        let frame = self.pop_frame(&mut stack, width)?;
        let code = self.checked_return_code(frame.cs)?;
        let cpl = self.state.cpl();
        if frame.cs.rpl() > cpl || self.state.is_64bit() {
            return self.iret_outer(stack, &frame, code, width);
        }
        self.check_target(code, frame.rip)?;
        let cs = self.load_descriptor(frame.cs, code)?;
        self.put_code(cs, frame.rip);
        stack.commit(self.state);
        self.put_frame_flags(frame.flags, width, cpl);
        Ok(())
    }

    /// `IRETQ`: always five slots.
    fn iretq(&mut self) -> Result<(), Abort> {
        if self.state.flags_have(rflags::NT) {
            return Err(general());
        }
        let stack = Stack::current(self.state);
        let [rip, cs, flags, rsp, ss] = match stack.peek_frame::<5>(self) {
            Ok(frame) => frame,
            Err(abort) => return Err(self.first_fault(stack, abort)),
        };
        let frame = Frame {
            rip,
            cs: Selector(cs as u16),
            flags,
        };
        let code = self.checked_return_code(frame.cs)?;
        self.finish_with_stack(&frame, code, rsp, Selector(ss as u16), Width::Qword)
    }

    /// The fault that is found first, in the order in which AMD's CPUs read the slots.
    fn first_fault(&mut self, stack: Stack, any: Abort) -> Abort {
        let found = [2, 1, 0, 4, 3]
            .into_iter()
            .find_map(|slot| stack.peek(self, slot, Width::Qword).err());
        found.unwrap_or(any)
    }

    fn finish_with_stack(
        &mut self,
        frame: &Frame,
        code: Descriptor,
        rsp: u64,
        ss: Selector,
        width: Width,
    ) -> Result<(), Abort> {
        let cpl = self.state.cpl();
        let level = frame.cs.rpl();
        if self.offer.vendor == Vendor::Amd {
            // Before the stack's selector, on AMD's CPUs.
            self.check_target(code, frame.rip)?;
        }
        let ss = self.checked_return_stack(ss, level, code)?;
        self.check_target(code, frame.rip)?;
        let cs = self.load_descriptor(frame.cs, code)?;
        self.put_code(cs, frame.rip);
        put_outer_stack(self.state, ss, rsp & width.mask());
        self.put_frame_flags(frame.flags, width, cpl);
        if level > cpl {
            self.drop_inner_segments(level);
        }
        Ok(())
    }
}
