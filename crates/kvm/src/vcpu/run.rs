//! `KVM_RUN` (`kvm_arch_vcpu_ioctl_run` in `arch/x86/kvm/x86.c`).
//!
//! ```text
//!   take over: signal mask, dirty register sets, CR8, the answer to the last exit
//!      │
//!      ├─ immediate_exit ───────────────────────────────► EINTR
//!      ▼
//!   ┌─ signal or kick? ─────────────────────────────────► EINTR, KVM_EXIT_INTR
//!   │  held? the vCPU's lock is given back for as long
//!   │  INIT, SIPI
//!   │  halted, or waiting for SIPI: sleep ─┐
//!   │  run guest code ─► exit for the monitor ──────────► 0
//!   └──────────┴───────────────────────────┘
//!   give back: valid register sets, if_flag, CR8, apic_base
//! ```

use std::sync::Arc;

use cpu::{Exit, HostFault, IoDirection};
use kvm_bindings as kb;
use x86::rflags;

use super::exit::plain_reason;
use super::machine::{Completion, Life};
use super::platform::VcpuPlatform;
use super::{Inner, Machine, Vcpu};
use crate::clock::kvmclock::{Pause, add_steal};
use crate::clock::steal::StealMeter;
use crate::errno::Errno;
use crate::irqchip::policy::ChipMode;
use crate::signals::{self, Section};
use crate::table::SYNC_REGS;
use crate::turns::{self, Turns};

/// What the loop does next.
enum Step {
    /// Once more.
    Again,
    /// Back to the monitor.
    Leave,
    /// Not now: somebody holds the vCPUs.
    Wait,
}

/// How far a run has come.
enum Progress {
    /// Back to the monitor.
    Ended,
    /// It goes on when nobody holds the vCPUs any more.
    Held,
}

impl Vcpu {
    /// `KVM_RUN`: what happened is in [`Vcpu::run_page`].
    pub fn run(&self) -> Result<(), Errno> {
        let mut inner = self.lock();
        if inner.machine.life == Life::New {
            inner.machine.life = Life::HasRun;
            signals::adopt();
            turns::ask_for(Turns::Long);
        }
        self.start(&mut inner)?;
        self.run_page().clear_flags();
        let section = Section::enter(&**self.kicker(), inner.machine.signal_mask);
        let mut progress = self.run_section(&mut inner, &section);
        while let Ok(Progress::Held) = progress {
            drop(inner);
            self.wait_while_held(&section);
            inner = self.lock();
            progress = self.run_on(&mut inner, &section);
        }
        if progress.is_err() && self.run_page().is_interrupted() {
            self.counters().signal_exits.bump();
        }
        self.give_back(&mut inner);
        drop(inner);
        drop(section);
        progress.map(|_| ())
    }

    /// The engine, at the first run.
    fn start(&self, inner: &mut Inner) -> Result<(), Errno> {
        let features = self.paging_features(&inner.machine);
        let ring = self.run_page().dirty_ring();
        if let Some(engine) = inner.core.start(self.vm(), self.id())? {
            // A CPU that has never run has no TLB to flush.
            let _ = engine.mmu_mut().set_features(features);
            if let Some((entries, bytes)) = ring {
                let set = engine.mmu_mut().set_dirty_ring(entries, bytes);
                set.map_err(|error| Errno(error.errno()))?;
            }
            self.kicker().connect(engine.kicker());
            // There is one engine in a vCPU's life.
            let _ = self.counters().mmu.set(Arc::clone(engine.mmu().stats()));
        }
        Ok(())
    }

    fn run_section(&self, inner: &mut Inner, section: &Section) -> Result<Progress, Errno> {
        let immediate = self.run_page().wants_immediate_exit();
        if inner.machine.mp_state == kb::KVM_MP_STATE_UNINITIALIZED {
            return if immediate {
                Err(Errno::EINTR)
            } else {
                self.wait_for_init(inner, section)
            };
        }
        self.take_over(inner)?;
        let unfinished = self.complete(inner);
        if immediate {
            let asks_again = unfinished && self.finish_instruction(inner)?;
            return if asks_again {
                Ok(Progress::Ended)
            } else {
                Err(Errno::EINTR)
            };
        }
        self.run_page().set_reason(kb::KVM_EXIT_UNKNOWN);
        self.run_on(inner, section)
    }

    fn run_on(&self, inner: &mut Inner, section: &Section) -> Result<Progress, Errno> {
        if inner.machine.mp_state == kb::KVM_MP_STATE_UNINITIALIZED {
            return self.wait_for_init(inner, section);
        }
        loop {
            match self.step(inner, section)? {
                Step::Again => {}
                Step::Leave => return Ok(Progress::Ended),
                Step::Wait => return Ok(Progress::Held),
            }
        }
    }

    /// An application processor before its INIT: sleeps, and lets the monitor look after each event.
    fn wait_for_init(&self, inner: &mut Inner, section: &Section) -> Result<Progress, Errno> {
        self.sleep(inner, section);
        self.accept_startup(inner);
        if section.noted() || self.kicker().take() {
            self.run_page().set_reason(kb::KVM_EXIT_INTR);
            return Err(Errno::EINTR);
        }
        if self.vm().is_held() {
            return Ok(Progress::Held);
        }
        Err(Errno::EAGAIN)
    }

    /// What the monitor put into `kvm_run`.
    fn take_over(&self, inner: &mut Inner) -> Result<(), Errno> {
        let page = self.run_page();
        let (valid, dirty) = page.sync_sets();
        if (valid | dirty) & !u64::from(SYNC_REGS) != 0 {
            return Err(Errno::EINVAL);
        }
        self.take_dirty_sets(inner, dirty)?;
        if self.lapic().is_none() {
            let cr8 = page.cr8();
            if cr8 > 15 {
                return Err(Errno::EINVAL);
            }
            inner.machine.cr8 = cr8 as u8;
        }
        Ok(())
    }

    fn take_dirty_sets(&self, inner: &mut Inner, dirty: u64) -> Result<(), Errno> {
        let page = self.run_page();
        let has = |set: u32| dirty & u64::from(set) != 0;
        if dirty == 0 {
            return Ok(());
        }
        let sets = page.sync_regs();
        if has(kb::KVM_SYNC_X86_REGS) {
            super::regs::set_regs(inner.core.state_mut(), &sets.regs);
            page.clear_dirty(kb::KVM_SYNC_X86_REGS);
        }
        if has(kb::KVM_SYNC_X86_SREGS) {
            self.take_sregs(inner, &sets.sregs)?;
            page.clear_dirty(kb::KVM_SYNC_X86_SREGS);
        }
        if has(kb::KVM_SYNC_X86_EVENTS) {
            self.take_events(inner, &sets.events)?;
            page.clear_dirty(kb::KVM_SYNC_X86_EVENTS);
        }
        Ok(())
    }

    /// Hands the monitor's answer to the CPU. Whether an instruction must run on to use it.
    fn complete(&self, inner: &mut Inner) -> bool {
        let page = self.run_page();
        let completion = std::mem::take(&mut inner.machine.completion);
        let Some(engine) = inner.core.engine_mut() else {
            return false;
        };
        match completion {
            Completion::None => return false,
            Completion::Port { bytes } => engine.complete_io(&page.port_input(bytes)),
            Completion::Mmio { bytes } => engine.complete_mmio(&page.mmio_input(bytes)),
            Completion::Msr => engine.complete_msr(page.msr_input()),
            Completion::Hypercall => engine.complete_hypercall(page.hypercall_input()),
        }
        engine.is_mid_instruction()
    }

    /// Runs one instruction to its end, whatever else waits: the kernel finishes an access before it
    /// looks at `immediate_exit`, and goes on with a repeated string instruction for up to 1024
    /// elements. Whether it needs another answer.
    pub(super) fn finish_instruction(&self, inner: &mut Inner) -> Result<bool, Errno> {
        const MOST_ELEMENTS: u32 = 1024;
        let begun_at = inner.core.state().rip;
        let mut elements = 0;
        let watched = inner.core.debug();
        inner.core.set_debug(cpu::system::GuestDebug {
            enabled: true,
            single_step: true,
            block_interrupts: true,
            ..watched
        });
        let exit = loop {
            match self.enter(inner) {
                Some(Exit::Interrupted) => {}
                Some(Exit::Debug(_))
                    if inner.core.state().rip == begun_at && elements < MOST_ELEMENTS =>
                {
                    elements += 1;
                }
                other => break other,
            }
        };
        inner.core.set_debug(watched);
        match exit {
            None => Err(Errno::EIO),
            Some(Exit::Debug(_)) if !watched.single_step => Ok(false),
            Some(exit) => self
                .dispatch(inner, &exit)
                .map(|step| matches!(step, Step::Leave)),
        }
    }

    fn step(&self, inner: &mut Inner, section: &Section) -> Result<Step, Errno> {
        let interrupted = section.noted() || self.kicker().take();
        if interrupted || self.vm().is_held() {
            // A device's answer is taken up first: the monitor sees whole instructions.
            let unfinished = inner
                .core
                .engine()
                .is_some_and(cpu::Vcpu::is_mid_instruction);
            if unfinished && self.finish_instruction(inner)? {
                return Ok(Step::Leave);
            }
            if !interrupted {
                return Ok(Step::Wait);
            }
            self.run_page().set_reason(kb::KVM_EXIT_INTR);
            return Err(Errno::EINTR);
        }
        self.accept_startup(inner);
        self.collect_nmis(inner);
        if Self::is_asleep(inner) {
            self.sleep(inner, section);
            return Ok(Step::Again);
        }
        if let Some(step) = self.before_entry(inner) {
            return Ok(step);
        }
        match self.enter(inner) {
            Some(exit) => self.dispatch(inner, &exit),
            None => Err(Errno::EIO),
        }
    }

    /// Exits that need no guest code.
    fn before_entry(&self, inner: &mut Inner) -> Option<Step> {
        let irqchip = self.vm().irqchip();
        if let Some(vector) = self.lapic().and_then(|lapic| irqchip.take_eoi_exit(lapic)) {
            self.run_page().put_eoi(vector);
            return Some(Step::Leave);
        }
        if let Some(access) = inner.machine.tpr_access.take() {
            self.run_page().put_tpr_access(access);
            return Some(Step::Leave);
        }
        if std::mem::take(&mut inner.machine.tpr_exit) {
            self.run_page().set_reason(kb::KVM_EXIT_SET_TPR);
            return Some(Step::Leave);
        }
        if inner
            .core
            .engine()
            .is_some_and(|engine| engine.mmu().dirty_ring_full())
        {
            self.run_page().set_reason(kb::KVM_EXIT_DIRTY_RING_FULL);
            return Some(Step::Leave);
        }
        if inner.machine.clock_generation != self.vm().clock_generation() {
            inner.machine.clock_stale = true;
        }
        if inner.machine.clock_stale {
            self.refresh_clock(&mut inner.machine);
        }
        self.account_steal(&mut inner.machine);
        None
    }

    /// Runs guest code.
    fn enter(&self, inner: &mut Inner) -> Option<Exit> {
        self.show_apic(&mut inner.machine);
        let mut platform = VcpuPlatform {
            vcpu: self,
            machine: &mut inner.machine,
        };
        let engine = inner.core.engine_mut()?;
        let exit = engine.run(&mut platform);
        self.counters().exits.bump();
        self.hear_apic(&mut inner.machine);
        Some(exit)
    }

    fn dispatch(&self, inner: &mut Inner, exit: &Exit) -> Result<Step, Errno> {
        let page = self.run_page();
        match exit {
            Exit::Interrupted => return Ok(Step::Again),
            Exit::Halt if self.halt(inner) => return Ok(Step::Again),
            Exit::Io(io) => {
                self.counters().io_exits.bump();
                let output = inner.core.engine().map_or(&[][..], cpu::Vcpu::output);
                page.put_io(io, output);
                let bytes = match io.direction {
                    IoDirection::In => usize::from(io.size) * io.count as usize,
                    IoDirection::Out => 0,
                };
                inner.machine.completion = Completion::Port { bytes };
            }
            Exit::Mmio(mmio)
                if self.reports_tpr(&inner.machine, mmio.gpa, usize::from(mmio.len)) =>
            {
                return Ok(if self.do_tpr_access(inner, mmio)? {
                    Step::Leave
                } else {
                    Step::Again
                });
            }
            Exit::Mmio(mmio) => {
                self.counters().mmio_exits.bump();
                page.put_mmio(mmio);
                let bytes = match mmio.write {
                    None => usize::from(mmio.len),
                    Some(_) => 0,
                };
                inner.machine.completion = Completion::Mmio { bytes };
            }
            Exit::Msr(msr) => {
                page.put_msr(msr);
                inner.machine.completion = Completion::Msr;
            }
            Exit::Hypercall(call) => {
                page.put_hypercall(call);
                inner.machine.completion = Completion::Hypercall;
            }
            Exit::Debug(debug) => page.put_debug(debug),
            Exit::InternalError(error) => page.put_internal_error(error),
            Exit::FailEntry { reason } => page.put_fail_entry(*reason),
            Exit::HostFault(fault) => {
                page.put_memory_fault(fault, self.memory_fault_flags(fault));
                return Err(Errno::EFAULT);
            }
            Exit::Halt | Exit::Shutdown | Exit::InterruptWindow => {
                if *exit == Exit::InterruptWindow {
                    self.counters().irq_window_exits.bump();
                }
                page.set_reason(plain_reason(exit).unwrap_or(kb::KVM_EXIT_UNKNOWN));
            }
        }
        Ok(Step::Leave)
    }

    /// Which of its two memories the guest meant.
    fn memory_fault_flags(&self, fault: &HostFault) -> u32 {
        let slots = self.vm().slots().snapshot(0);
        let private = fault.gpa.is_some_and(|gpa| slots.is_private(gpa.frame()));
        if private {
            kb::KVM_MEMORY_EXIT_FLAG_PRIVATE
        } else {
            0
        }
    }

    /// Writes the guest's clock page anew.
    pub(super) fn refresh_clock(&self, machine: &mut Machine) {
        machine.clock_stale = false;
        machine.clock_generation = self.vm().clock_generation();
        let Some(page) = machine.msrs.paravirtual.clock_page() else {
            return;
        };
        let pause = if std::mem::take(&mut machine.paused) {
            Pause::Happened
        } else {
            Pause::None
        };
        // A page in no memory is the guest's mistake, and ignored as in the kernel.
        let _ = self
            .vm()
            .clock()
            .write_page(self.vm(), page, self.tsc(), pause);
    }

    fn account_steal(&self, machine: &mut Machine) {
        let Some(page) = machine.msrs.paravirtual.steal_page() else {
            return;
        };
        let stolen = machine.steal.get_or_insert_with(StealMeter::new).take();
        let _ = add_steal(self.vm(), page, stolen);
    }

    /// Whether an interrupt of the monitor's would be taken (`kvm_cpu_accept_dm_intr`).
    pub(super) fn accepts_monitor_interrupt(&self) -> bool {
        match self.lapic() {
            None => true,
            Some(lapic) => {
                self.vm().irqchip().mode() == ChipMode::Split
                    && lapic.accepts_pic()
                    && !lapic.has_external_vector()
            }
        }
    }

    /// What `kvm_run` shows after every exit.
    fn give_back(&self, inner: &mut Inner) {
        self.mirror_cpuid(inner);
        let state = inner.core.state();
        let events = &state.events;
        let interrupts_on = state.rflags & rflags::IF != 0;
        let at_boundary = events.exception.is_none()
            && events.interrupt.is_none()
            && !events.sti_shadow
            && !events.mov_ss_shadow;
        let ready = self.vm().irqchip().mode() == ChipMode::Kernel
            || interrupts_on && at_boundary && self.accepts_monitor_interrupt();
        let cr8 = self.task_priority(&inner.machine);
        let base = self.apic_base(&inner.machine);
        self.run_page().show(interrupts_on, ready, cr8, base);
        self.give_valid_sets(inner);
        self.refresh_stats();
    }

    fn give_valid_sets(&self, inner: &mut Inner) {
        let (valid, _) = self.run_page().sync_sets();
        let valid = valid & u64::from(SYNC_REGS);
        if valid == 0 {
            return;
        }
        let mut sets = self.run_page().sync_regs();
        if valid & u64::from(kb::KVM_SYNC_X86_REGS) != 0 {
            sets.regs = super::regs::get_regs(inner.core.state());
        }
        if valid & u64::from(kb::KVM_SYNC_X86_SREGS) != 0 {
            sets.sregs = self.sregs_of(inner);
        }
        if valid & u64::from(kb::KVM_SYNC_X86_EVENTS) != 0 {
            sets.events = self.events_of(inner);
        }
        self.run_page().set_sync_regs(&sets);
    }
}
