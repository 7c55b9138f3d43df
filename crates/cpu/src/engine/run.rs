//! The loop around translated code.

#![expect(unsafe_code, reason = "enters translated code")]

use memory::quiesce::Requests;
use x86::rflags;

use super::context::code_context;
use super::enter;
use super::signals::{Running, set_running};
use super::sites::Then;
use super::vcpu::Vcpu;
use crate::system::{self, Abort, Boundary, Effects, Event};
use crate::translate::Mode;
use crate::{Exception, Exit, Handled, Platform};

/// The arithmetic flags of an RFLAGS image, as [`Frame::arith`](super::frame::Frame::arith) has them.
pub(super) fn arith(flags: u64) -> u16 {
    let low = flags & (rflags::ARITHMETIC & 0xff);
    (low << 8 | flags >> 11 & 1) as u16
}

impl Vcpu {
    /// Runs guest code until something is for the monitor.
    pub fn run(&mut self, platform: &mut dyn Platform) -> Exit {
        let requests = self.kick.enter(&self.memory.participant);
        self.begin_run();
        let before = set_running(Some(self.running()));
        let exit = match self.serve(requests) {
            Ok(()) => self.drive(platform),
            Err(exit) => exit,
        };
        set_running(before);
        self.end_run();
        self.memory.participant.leave();
        exit
    }

    fn running(&self) -> Running {
        Running {
            frame: self.mapping.frame().as_ptr(),
            code: self.cache.range(),
            stub: self.cache.base() + u64::from(self.trap_stub),
        }
    }

    fn begin_run(&mut self) {
        self.check_code_again();
        self.boundary_due = true;
        let state = self.state_changed;
        self.state_changed = false;
        self.suspect_events();
        self.refresh_fast();
        self.flags_in();
        if state {
            self.adopt_state();
        }
        let context = code_context(self.state(), self.length);
        self.adopt_context(context);
        let frame = self.frame_mut();
        enter::save_host_fpu(frame);
        enter::load_fpu(frame);
    }

    /// Each page of code is compared with memory before it is used again: others may have written
    /// there without a TLB of ours, as devices do.
    fn check_code_again(&mut self) {
        self.epoch += 1;
        self.view().tlb().flush_code();
    }

    /// The monitor has changed the state: nothing derived from it holds any more.
    fn adopt_state(&mut self) {
        let registers = super::memory::paging_registers(self.state());
        let mut view = self.view();
        if *view.memory.mmu.registers() != registers {
            let _ = view.memory.mmu.set_registers(&registers);
            let _ = view.memory.mmu.invalidate_all();
        }
        view.flush_all();
    }

    fn end_run(&mut self) {
        self.fpu_out();
        let frame = self.frame_mut();
        enter::restore_host_fpu(frame);
        self.flags_out();
        self.take_shadow();
        let mut pending = std::mem::take(&mut self.pending);
        let state = &mut self.frame_mut().state;
        system::settle_shadow(state, &mut pending);
        system::bring_rf_back(state, pending.resumes.take());
        self.pending = pending;
    }

    /// Takes RFLAGS apart for translated code: what lives elsewhere is clear in the frame's.
    pub(super) fn flags_in(&mut self) {
        let frame = self.frame_mut();
        let flags = frame.state.rflags;
        frame.state.rflags = flags & !(rflags::ARITHMETIC | rflags::DF | rflags::FIXED);
        frame.arith = arith(flags);
        frame.df = u8::from(flags & rflags::DF != 0);
    }

    /// Puts RFLAGS together again.
    pub(super) fn flags_out(&mut self) {
        let frame = self.frame_mut();
        let arith = u64::from(frame.arith);
        let low = arith >> 8 & (rflags::ARITHMETIC & 0xff);
        let rest = frame.state.rflags & !(rflags::ARITHMETIC | rflags::DF);
        let df = if frame.df == 0 { 0 } else { rflags::DF };
        frame.state.rflags = rest | low | (arith & 1) << 11 | df | rflags::FIXED;
    }

    /// Takes over what a function of [`system`] has changed.
    pub(super) fn after_system(&mut self, effects: Effects) {
        const CONTEXT: Effects = Effects::MODE
            .union(Effects::SEGMENTS)
            .union(Effects::FPU)
            .union(Effects::ACCESS_RIGHTS)
            .union(Effects::DELIVERED);
        // A handler begins with fewer interrupts allowed than before, and without TF and RF.
        let due = if effects.contains(Effects::DELIVERED) {
            self.has_more_events()
        } else {
            effects.contains(Effects::DEBUG)
        };
        if due || effects.contains(Effects::EVENTS) {
            self.boundary_due = true;
        }
        if effects.contains(Effects::INTERRUPTS) && self.frame().fast.waits != 0 {
            self.boundary_due = true;
        }
        if effects.intersects(Effects::PAGING) {
            self.refresh_fast();
        }
        if effects.intersects(CONTEXT) {
            let context = code_context(self.state(), self.length);
            if context != self.context {
                self.adopt_context(context);
            }
        }
    }

    /// Does what others asked for.
    pub(super) fn serve(&mut self, requests: Requests) -> Result<(), Exit> {
        let requests = requests | std::mem::replace(&mut self.memory.late, Requests::empty());
        let requests = self
            .memory
            .domain
            .settle(&self.memory.participant, requests);
        if requests.contains(Requests::FLUSH_TLB) {
            self.view().flush_all();
        }
        if requests.contains(Requests::INVALIDATE_CODE) {
            self.take_voids();
        }
        if requests.contains(Requests::CHECK_CODE) {
            self.check_code_again();
        }
        if requests.contains(Requests::EVENT) {
            self.boundary_due = true;
        }
        if requests.contains(Requests::EXIT) {
            return Err(Exit::Interrupted);
        }
        Ok(())
    }

    fn look_around(&mut self) -> Result<(), Exit> {
        if self.kick.is_asked() {
            let requests = self.kick.checkpoint(&self.memory.participant);
            self.serve(requests)?;
            self.view().keep_limits();
        } else if !self.memory.late.is_empty() {
            self.serve(Requests::empty())?;
        }
        Ok(())
    }

    fn drive(&mut self, platform: &mut dyn Platform) -> Exit {
        loop {
            if self.memory.mmio.has_writes() {
                self.suspect_events();
                if let Some(write) = self.memory.mmio.flush(platform) {
                    return Exit::Mmio(write);
                }
            }
            if let Err(exit) = self.look_around() {
                return exit;
            }
            let mut result = Ok(());
            let resumes = self.memory.mmio.resumes();
            if self.boundary_due && !resumes {
                result = self.boundary(platform);
            }
            if result.is_ok() && (resumes || !self.boundary_due) {
                result = self.instructions(platform);
            }
            if let Err(Abort::Exception(exception)) = result {
                result = self.raise(exception, platform);
            }
            match result {
                Ok(()) => {}
                Err(Abort::Exit(Exit::Mmio(asked))) if asked.write.is_none() => {
                    self.suspect_events();
                    if self.memory.mmio.ask(platform) == Handled::No {
                        return Exit::Mmio(asked);
                    }
                    self.memory.mmio.resume();
                }
                Err(Abort::Exit(exit)) => return exit,
                Err(Abort::HostFault(fault)) => return Exit::HostFault(fault),
                // `raise` gives no exceptions.
                Err(Abort::Exception(_)) => return Exit::Shutdown,
            }
        }
    }

    fn boundary(&mut self, platform: &mut dyn Platform) -> Result<(), Abort> {
        self.boundary_due = false;
        self.effects = Effects::empty();
        let resumes = self.pending.resumes.take();
        system::bring_rf_back(&mut self.frame_mut().state, resumes);
        let result = self.with_context(platform, system::boundary);
        match &result {
            Err(_) => self.boundary_due = true,
            Ok(found) => {
                self.frame_mut().fast.waits = u32::from(self.event_waits(platform));
                if *found == Boundary::Delivered && !self.effects.contains(Effects::EVENTS) {
                    self.boundary_due =
                        self.state().rflags & rflags::IF != 0 || self.has_more_traps();
                }
            }
        }
        result.map(|_| ())
    }

    /// Lets what follows run at full speed although RF is set, if that is all the same; whether it does.
    pub(super) fn put_rf_aside(&mut self) -> bool {
        if self.state().rflags & rflags::RF == 0 {
            return false;
        }
        let guest_debug = self.guest_debug;
        let resumes = system::put_rf_aside(&mut self.frame_mut().state, &guest_debug);
        self.pending.resumes = resumes.or(self.pending.resumes);
        resumes.is_some()
    }

    /// Whether something is to be delivered as soon as interrupts are allowed. Right behind a look at
    /// events: where they are allowed nothing is left.
    fn event_waits(&self, platform: &mut dyn Platform) -> bool {
        let state = self.state();
        let events = &state.events;
        let allowed = state.rflags & rflags::IF != 0 && !events.sti_shadow && !events.mov_ss_shadow;
        events.nmi_pending > 0
            || !allowed && (platform.interrupt_pending() || platform.interrupt_window_requested())
    }

    fn raise(&mut self, exception: Exception, platform: &mut dyn Platform) -> Result<(), Abort> {
        self.memory.mmio.end();
        self.effects = Effects::empty();
        let due = self.boundary_due;
        let result = self.with_context(platform, |ctx| {
            system::deliver(ctx, Event::Exception(exception))
        });
        if result.is_ok() && !self.effects.contains(Effects::EVENTS) {
            // The handler begins with fewer interrupts allowed than before.
            self.boundary_due = due || self.has_more_events();
        }
        result
    }

    fn has_more_events(&self) -> bool {
        self.frame().fast.waits != 0 || self.has_more_traps()
    }

    /// Whether something that IF doesn't hold back may be due.
    fn has_more_traps(&self) -> bool {
        self.frame().state.events.nmi_pending > 0
            || self.pending.debug != 0
            || self.guest_debug.enabled
    }

    fn instructions(&mut self, platform: &mut dyn Platform) -> Result<(), Abort> {
        self.take_shadow();
        self.flags_out();
        self.flags_in();
        self.put_rf_aside();
        if system::must_step(self.state(), &self.pending, &self.guest_debug) {
            self.extra = Mode::STEP;
            let result = self.one(platform);
            self.extra = 0;
            return result;
        }
        self.enter_at_rip(platform).map(|_| ())
    }

    fn enter_at_rip(&mut self, platform: &mut dyn Platform) -> Result<Then, Abort> {
        if self.wants_alone() {
            return self.alone(platform);
        }
        let number = self.find(0)?;
        let entry = self.blocks.blocks[number as usize].plain;
        self.follow(self.cache.base() + u64::from(entry), platform)
    }

    /// One instruction, between the calls that stepping asks for.
    fn one(&mut self, platform: &mut dyn Platform) -> Result<(), Abort> {
        self.effects = Effects::empty();
        let step = self.with_context(platform, system::begin_instruction)?;
        let then = self.enter_at_rip(platform)?;
        if then == Then::Done {
            self.with_context(platform, |ctx| system::end_instruction(ctx, step));
            self.boundary_due = true;
        }
        Ok(())
    }

    /// Runs translated code from this address until the loop must look around.
    pub(super) fn follow(
        &mut self,
        mut target: u64,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        loop {
            let site = self.enter(target);
            match self.handle(site, platform)? {
                Then::Enter(next) => target = next,
                then => return Ok(then),
            }
        }
    }

    fn enter(&mut self, target: u64) -> u32 {
        let frame = self.mapping.frame().as_ptr();
        // SAFETY: the frame is this vCPU's, to which no reference exists now; the target was given
        // by its own tables, which hold no code that does not fit its state.
        let site = unsafe { enter::enter(frame, target as *const u8) };
        let view = self.frame().fast.view;
        if view != self.context.mode.view() as u32 {
            // Translated code went there only because the tables of that view were for its mode.
            self.context = self.contexts[view as usize];
        }
        site
    }
}
