//! A vCPU that sleeps: `HLT`, and an application processor before its INIT and SIPI.
//!
//! | `HLT` with                                     | is                                            |
//! |------------------------------------------------|-----------------------------------------------|
//! | a local APIC                                   | `KVM_MP_STATE_HALTED`, asleep in `KVM_RUN`    |
//! | `KVM_X86_DISABLE_EXITS_HLT`                    | the CPU's own affair: asleep in "guest mode"  |
//! | neither                                        | `KVM_EXIT_HLT`                                |
//!
//! Before it sleeps, a vCPU may look for a while whether something comes: `KVM_CAP_HALT_POLL` says
//! how long at most. As in the kernel, the time grows while sleeps turn out short and shrinks to
//! nothing when they are long, and a guest that polls itself (`MSR_KVM_POLL_CONTROL`) turns it off.
//! Without the capability nothing is polled, as with the module's parameter `halt_poll_ns=0`.

use std::time::{Duration, Instant};

use kvm_bindings as kb;
use x86::rflags;

use super::{Inner, Vcpu};
use crate::irqchip::wake::Woken;
use crate::signals::Section;

/// The first step of polling, and the factor of the next ones.
const FIRST_POLL: Duration = Duration::from_micros(10);
const GROWTH: u32 = 2;

impl Vcpu {
    /// `HLT`. Whether it is dealt with here; if not, it leaves for the monitor.
    pub(super) fn halt(&self, inner: &mut Inner) -> bool {
        let own_affair = self.vm().halts_in_guest();
        if self.lapic().is_none() && !own_affair {
            return false;
        }
        self.counters().halt_exits.bump();
        if !self.has_events(inner) {
            if own_affair {
                inner.machine.halted_in_guest = true;
            } else {
                inner.machine.mp_state = kb::KVM_MP_STATE_HALTED;
            }
        }
        true
    }

    /// Whether it is to sleep before it runs guest code.
    pub(super) fn is_asleep(inner: &Inner) -> bool {
        inner.machine.mp_state != kb::KVM_MP_STATE_RUNNABLE || inner.machine.halted_in_guest
    }

    /// Sleeps until there is something to do, a signal, a kick, or a hold. A halted vCPU that has
    /// something to do is runnable afterwards.
    pub(super) fn sleep(&self, inner: &mut Inner, section: &Section) {
        let begun = Instant::now();
        if !self.poll(inner, section) && !self.block(inner, section) {
            return;
        }
        self.learn_poll(inner, begun.elapsed());
        self.counters().halt_wakeup.bump();
        inner.machine.halted_in_guest = false;
        let state = inner.machine.mp_state;
        if matches!(
            state,
            kb::KVM_MP_STATE_HALTED | kb::KVM_MP_STATE_AP_RESET_HOLD
        ) {
            if let Some(lapic) = self.lapic() {
                lapic.take_unhalt();
            }
            inner.machine.mp_state = kb::KVM_MP_STATE_RUNNABLE;
        }
    }

    /// Whether it was woken by something to do.
    fn block(&self, inner: &Inner, section: &Section) -> bool {
        let gate = self.kicker().gate();
        loop {
            gate.shut();
            if self.has_reason_to_wake(inner) {
                gate.cancel();
                return true;
            }
            if self.is_disturbed(section) {
                gate.cancel();
                return false;
            }
            let woken = match self.lapic() {
                Some(lapic) => lapic.sleep(gate),
                None => gate.wait(None),
            };
            if woken == Woken::Interrupted && section.noted() {
                return false;
            }
        }
    }

    fn is_disturbed(&self, section: &Section) -> bool {
        section.noted() || self.kicker().is_kicked() || self.vm().is_held()
    }

    /// Looks for a while. Whether there is something to do.
    fn poll(&self, inner: &mut Inner, section: &Section) -> bool {
        let time = self.poll_limit(inner).min(inner.machine.poll_time);
        if time.is_zero() {
            return false;
        }
        self.counters().halt_attempted_poll.bump();
        let end = Instant::now() + time;
        while Instant::now() < end && !self.is_disturbed(section) {
            if self.has_reason_to_wake(inner) {
                self.counters().halt_successful_poll.bump();
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// The longest that may be polled now.
    fn poll_limit(&self, inner: &Inner) -> Duration {
        if inner.machine.msrs.paravirtual.host_may_poll() {
            self.vm().halt_poll()
        } else {
            Duration::ZERO
        }
    }

    fn learn_poll(&self, inner: &mut Inner, slept: Duration) {
        let limit = self.poll_limit(inner);
        let time = &mut inner.machine.poll_time;
        if slept > limit {
            *time = Duration::ZERO;
        } else if slept > *time {
            *time = (*time * GROWTH).max(FIRST_POLL).min(limit);
        }
    }

    /// While somebody holds the vCPUs: waits for the end of that, or a signal or kick. The vCPU's
    /// lock is free meanwhile.
    pub(super) fn wait_while_held(&self, section: &Section) {
        // Two threads may run one vCPU, and a gate wakes one of them.
        const AT_MOST: Duration = Duration::from_millis(50);
        let gate = self.kicker().gate();
        loop {
            gate.shut();
            if !self.vm().is_held() || section.noted() || self.kicker().is_kicked() {
                gate.cancel();
                return;
            }
            gate.wait(Some(AT_MOST));
        }
    }

    /// Whether a halted vCPU has a reason to go on (`kvm_vcpu_has_events`).
    fn has_events(&self, inner: &Inner) -> bool {
        let state = inner.core.state();
        let events = &state.events;
        let nmi = events.nmi_pending > 0 && !events.nmi_masked;
        let plain = nmi || events.exception.is_some() || events.triple_fault;
        let Some(lapic) = self.lapic() else {
            return plain || events.interrupt.is_some();
        };
        let open = state.rflags & rflags::IF != 0 && !events.sti_shadow && !events.mov_ss_shadow;
        plain
            || lapic.has_nmis()
            || lapic.is_unhalted()
            || lapic.has_startup_events()
            || open && self.vm().irqchip().has_interrupt(lapic)
    }

    fn has_reason_to_wake(&self, inner: &Inner) -> bool {
        let startup = self.lapic().is_none_or(|lapic| lapic.has_startup_events());
        match inner.machine.mp_state {
            kb::KVM_MP_STATE_UNINITIALIZED | kb::KVM_MP_STATE_INIT_RECEIVED => startup,
            _ => self.has_events(inner),
        }
    }
}
