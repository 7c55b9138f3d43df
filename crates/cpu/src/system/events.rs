//! What is delivered between two instructions, and in which order (SDM 3A, table 7-2).
//!
//! | order | event                                              | held back by               |
//! |-------|----------------------------------------------------|----------------------------|
//! | 1     | an exception that the monitor or an exit left here | nothing                    |
//! | 2     | an interrupt that the monitor injected             | nothing                    |
//! | 3     | `#DB` traps of the last instruction                | the `MOV SS` shadow        |
//! | 4     | NMI                                                | NMI in service, shadows    |
//! | 5     | the interrupt controller's vector                  | IF, shadows                |
//!
//! Instruction breakpoints come after all of these, with the next instruction's fetch
//! ([`super::begin_instruction`]).

use x86::debug::DR6_BS;
use x86::rflags;

use super::step::look_at_shadow;
use super::{Abort, Context, Effects, Event, deliver};
use crate::{Exception, Exit};

/// What [`boundary`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Nothing to deliver.
    Continue,
    /// RIP is at a handler.
    Delivered,
}

/// Looks between two instructions for what must be delivered, and delivers it.
///
/// `Err(Exit::InterruptWindow)` where the monitor wants to know that an interrupt can be taken now.
pub fn boundary(ctx: &mut Context<'_>) -> Result<Boundary, Abort> {
    if ctx.state.events.triple_fault {
        ctx.state.events.triple_fault = false;
        return Err(Exit::Shutdown.into());
    }
    ctx.effects |= look_at_shadow(ctx.state, ctx.pending);
    match ctx.next_event()? {
        Some(event) => {
            deliver(ctx, event)?;
            Ok(Boundary::Delivered)
        }
        None => Ok(Boundary::Continue),
    }
}

impl Context<'_> {
    /// Takes the event that is due.
    fn next_event(&mut self) -> Result<Option<Event>, Abort> {
        let events = &mut self.state.events;
        if let Some(exception) = events.exception.take() {
            events.exception_injected = false;
            return Ok(Some(Event::Exception(exception)));
        }
        if let Some(interrupt) = events.interrupt.take() {
            return Ok(Some(if interrupt.soft {
                Event::SoftwareInterrupt(interrupt.vector)
            } else {
                Event::Interrupt(interrupt.vector)
            }));
        }
        if let Some(trap) = self.debug_trap()? {
            return Ok(Some(Event::Exception(trap)));
        }
        if self.takes_nmi() {
            self.state.events.nmi_pending -= 1;
            return Ok(Some(Event::Nmi));
        }
        self.next_interrupt()
    }

    fn debug_trap(&mut self) -> Result<Option<Exception>, Abort> {
        let retired = std::mem::take(&mut self.pending.retired);
        if retired && self.guest_debug.enabled && self.guest_debug.single_step {
            self.pending.debug |= DR6_BS;
        }
        if self.pending.debug == 0 || self.state.events.mov_ss_shadow {
            return Ok(None);
        }
        let bits = std::mem::take(&mut self.pending.debug);
        self.report_debug(bits)?;
        Ok(Some(Exception::debug(bits)))
    }

    fn takes_nmi(&self) -> bool {
        let events = &self.state.events;
        events.nmi_pending > 0
            && !events.nmi_masked
            && !events.mov_ss_shadow
            && !events.sti_shadow
            && !self.holds_interrupts()
    }

    /// Whether a maskable interrupt would be taken now.
    pub(super) fn takes_interrupts(&self) -> bool {
        let events = &self.state.events;
        self.state.flags_have(rflags::IF)
            && !events.mov_ss_shadow
            && !events.sti_shadow
            && !self.holds_interrupts()
    }

    /// Whether `HLT` would be over at once.
    pub(super) fn has_wakeup(&mut self) -> bool {
        self.takes_nmi()
            || self.takes_interrupts() && self.platform.interrupt_pending()
            || self.state.events.interrupt.is_some()
    }

    /// The monitor steps and wants no interrupts in between.
    fn holds_interrupts(&self) -> bool {
        self.guest_debug.single_step && self.guest_debug.block_interrupts
    }

    fn next_interrupt(&mut self) -> Result<Option<Event>, Abort> {
        if !self.takes_interrupts() {
            return Ok(None);
        }
        if self.platform.interrupt_pending()
            && let Some(vector) = self.platform.acknowledge_interrupt()
        {
            return Ok(Some(Event::Interrupt(vector)));
        }
        if self.platform.interrupt_window_requested() {
            return Err(Exit::InterruptWindow.into());
        }
        Ok(None)
    }

    /// An event that could not be delivered yet waits here.
    pub(super) fn keep_event(&mut self, event: Event) {
        let events = &mut self.state.events;
        match event {
            Event::Exception(exception) => {
                events.exception = Some(exception);
                events.exception_injected = true;
            }
            Event::Interrupt(vector) => {
                events.interrupt = Some(crate::InjectedInterrupt {
                    vector,
                    soft: false,
                });
            }
            Event::SoftwareInterrupt(vector) => {
                events.interrupt = Some(crate::InjectedInterrupt { vector, soft: true });
            }
            Event::Nmi => events.nmi_pending += 1,
        }
        self.effects |= Effects::EVENTS;
    }
}
