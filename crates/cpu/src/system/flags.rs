//! RFLAGS: `PUSHF`, `POPF`, `CLI`, `STI`, `STAC`, `CLAC` (SDM 2; SDM 3A, 7.8.1 and 21.3 for VME).

use iced_x86::Instruction;
use x86::control::Cr4;
use x86::rflags;

use super::context::LazyShadow;
use super::fault::{general, undefined};
use super::modes::Mode;
use super::offer::Instructions;
use super::operand::width_of_stack;
use super::registers::Width;
use super::stack::Stack;
use super::{Abort, Context, Effects, Next};

/// What virtual-8086 mode below IOPL 3 or a user task with CR4.PVI has instead of IF.
enum InterruptFlag {
    /// IF itself.
    Real,
    /// VIF.
    Virtual,
}

impl Context<'_> {
    /// Which flag `CLI` and `STI` change, or `#GP(0)`.
    fn interrupt_flag(&self) -> Result<InterruptFlag, Abort> {
        let state = &*self.state;
        let (privileged, extension) = match state.mode() {
            Mode::Real => return Ok(InterruptFlag::Real),
            Mode::Virtual8086 => (state.iopl() == 3, state.cr4_has(Cr4::VME)),
            _ => (
                state.cpl() <= state.iopl(),
                state.cpl() == 3 && state.cr4_has(Cr4::PVI),
            ),
        };
        if privileged {
            Ok(InterruptFlag::Real)
        } else if extension {
            Ok(InterruptFlag::Virtual)
        } else {
            Err(general())
        }
    }

    /// `CLI`.
    pub(super) fn cli(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let flag = match self.interrupt_flag()? {
            InterruptFlag::Real => rflags::IF,
            InterruptFlag::Virtual => rflags::VIF,
        };
        self.state.rip = self.next_rip(instruction);
        self.state.rflags &= !flag;
        Ok(Next::Sequential)
    }

    /// `STI`: interrupts are taken after one more instruction.
    pub(super) fn sti(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        match self.interrupt_flag()? {
            InterruptFlag::Real => {
                if !self.state.flags_have(rflags::IF) {
                    self.state.rflags |= rflags::IF;
                    self.state.events.sti_shadow = true;
                    self.pending.lazy_shadow = self.lazy_shadow(instruction);
                    self.effects |= Effects::EVENTS | Effects::SHADOW | Effects::DEBUG;
                }
            }
            InterruptFlag::Virtual => {
                if self.state.flags_have(rflags::VIP) {
                    return Err(general());
                }
                self.state.rflags |= rflags::VIF;
            }
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    fn lazy_shadow(&mut self, instruction: &Instruction) -> Option<LazyShadow> {
        let waited_for = self.state.events.nmi_pending > 0
            || self.platform.interrupt_window_requested()
            || self.platform.interrupt_pending();
        let rip = self.next_rip(instruction);
        (!waited_for).then_some(LazyShadow { rip, seen: false })
    }

    /// `MOV SS` and `POP SS` hold interrupts and debug traps off for one instruction; a second one
    /// in a row does not prolong that.
    pub(super) fn begin_mov_ss_shadow(&mut self) {
        if !self.state.events.mov_ss_shadow {
            self.state.events.mov_ss_shadow = true;
            self.effects |= Effects::SHADOW | Effects::DEBUG | Effects::EVENTS;
        }
    }

    /// `PUSHF`.
    pub(super) fn pushf(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let width = width_of_stack(instruction);
        let mut image = self.state.rflags & !(rflags::VM | rflags::RF);
        if self.state.mode() == Mode::Virtual8086 && self.state.iopl() < 3 {
            if width != Width::Word || !self.state.cr4_has(Cr4::VME) {
                return Err(general());
            }
            image = virtual_image(image);
        }
        let mut stack = Stack::current(self.state);
        stack.push(self, image, width)?;
        self.state.rip = self.next_rip(instruction);
        stack.commit(self.state);
        Ok(Next::Sequential)
    }

    /// `POPF`.
    pub(super) fn popf(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let width = width_of_stack(instruction);
        let restricted = self.state.mode() == Mode::Virtual8086 && self.state.iopl() < 3;
        if restricted && (width != Width::Word || !self.state.cr4_has(Cr4::VME)) {
            return Err(general());
        }
        let mut stack = Stack::current(self.state);
        let image = stack.pop(self, width)?;
        let next = self.next_rip(instruction);
        if restricted {
            self.set_virtual_flags(image)?;
        } else {
            let mask = self.poppable_flags() & width.mask();
            self.set_flags(image, mask);
            self.state.rflags &= !rflags::RF;
        }
        self.state.rip = next;
        stack.commit(self.state);
        Ok(Next::Sequential)
    }

    /// The flags that `POPF` may change here.
    fn poppable_flags(&self) -> u64 {
        let always =
            rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
        let cpl = self.state.cpl();
        let interrupt = if cpl <= self.state.iopl() {
            rflags::IF
        } else {
            0
        };
        let iopl = if cpl == 0 { rflags::IOPL } else { 0 };
        always | interrupt | iopl
    }

    /// Sets the flags under `mask`, and says what follows from those that changed.
    pub(super) fn set_flags(&mut self, image: u64, mask: u64) {
        let old = self.state.rflags;
        self.state.put_flags(mask, image);
        self.note_flags(old);
    }

    /// What follows from the flags that are not as in `old`.
    pub(super) fn note_flags(&mut self, old: u64) {
        let changed = old ^ self.state.rflags;
        let begun = changed & self.state.rflags;
        if begun & rflags::IF != 0 {
            self.effects |= Effects::INTERRUPTS;
        }
        if changed & (rflags::TF | rflags::RF) != 0 {
            self.effects |= Effects::DEBUG;
        }
        if changed & rflags::AC != 0 {
            self.effects |= Effects::ACCESS_RIGHTS | Effects::MODE;
        }
        if changed & rflags::VM != 0 {
            self.effects |= Effects::MODE;
        }
    }

    /// `POPF` of 16 bits in virtual-8086 mode below IOPL 3 with CR4.VME: IF goes to VIF.
    pub(super) fn set_virtual_flags(&mut self, image: u64) -> Result<(), Abort> {
        let enables = image & rflags::IF != 0;
        if image & rflags::TF != 0 || enables && self.state.flags_have(rflags::VIP) {
            return Err(general());
        }
        let mask = (rflags::ARITHMETIC | rflags::DF | rflags::NT | rflags::TF) & 0xffff;
        self.state.put_flags(mask, image);
        self.state
            .put_flags(rflags::VIF, if enables { rflags::VIF } else { 0 });
        self.state.rflags &= !rflags::RF;
        Ok(())
    }

    /// `STAC`, `CLAC`.
    pub(super) fn set_access_check(
        &mut self,
        instruction: &Instruction,
        value: u64,
    ) -> Result<Next, Abort> {
        if self.state.cpl() > 0 || !self.offer.instructions.contains(Instructions::SMAP) {
            return Err(undefined());
        }
        self.state.rip = self.next_rip(instruction);
        self.set_flags(value, rflags::AC);
        Ok(Next::Sequential)
    }
}

/// What `PUSHF` and `INT n` show of the flags in virtual-8086 mode below IOPL 3 with CR4.VME.
pub(super) fn virtual_image(flags: u64) -> u64 {
    let interrupt = if flags & rflags::VIF != 0 {
        rflags::IF
    } else {
        0
    };
    flags & !rflags::IF | interrupt | rflags::IOPL
}
