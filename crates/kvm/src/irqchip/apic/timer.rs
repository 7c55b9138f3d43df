//! The local APIC's timer (SDM 3A, 12.5.4): one-shot, periodic and TSC-deadline.
//!
//! A pure state machine: the time comes in as [`Now`], and what the host must do comes out as
//! [`Timer::alarm`], the moment at which [`Timer::fire`] must be called. As in kvm.ko, a timer that
//! has expired stays *pending* until the vCPU itself turns that into an interrupt, so nothing is
//! delivered to a vCPU that does not run.

use crate::clock::time::Now;

use super::registers::{divisor, lvt};

/// The shortest period of a periodic timer: a guest can't make the host busy.
pub const MIN_PERIOD_NS: u64 = 200_000;

/// How the timer counts (LVT timer, bits 17 and 18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Once from the initial count.
    #[default]
    OneShot,
    /// Again and again.
    Periodic,
    /// Until the TSC reaches `IA32_TSC_DEADLINE`.
    TscDeadline,
    /// The reserved encoding: nothing counts.
    Reserved,
}

impl Mode {
    /// From an LVT value, already masked by the bits that this CPU has.
    pub fn from_lvt(value: u32) -> Mode {
        match value & (3 << 17) {
            lvt::TIMER_ONESHOT => Mode::OneShot,
            lvt::TIMER_PERIODIC => Mode::Periodic,
            lvt::TIMER_TSC_DEADLINE => Mode::TscDeadline,
            _ => Mode::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Mode::OneShot | Mode::Periodic)
    }
}

/// The timer's state besides its registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timer {
    mode: Mode,
    divide: u32,
    /// Nanoseconds from the initial count to 0; 0 where the count is 0.
    period: u64,
    /// When the count reaches 0, on the monotonic clock.
    target: u64,
    /// `IA32_TSC_DEADLINE`.
    deadline: u64,
    /// When the host must call [`Timer::fire`].
    alarm: Option<u64>,
    /// Expired, and the vCPU has not taken notice.
    pending: bool,
    /// Nanoseconds of one cycle of the bus (`KVM_CAP_X86_APIC_BUS_CYCLES_NS`; 1 by default).
    bus_cycle_ns: u64,
}

impl Timer {
    /// A timer that stands still.
    pub fn new(bus_cycle_ns: u64) -> Timer {
        Timer {
            mode: Mode::OneShot,
            divide: divisor(0),
            period: 0,
            target: 0,
            deadline: 0,
            alarm: None,
            pending: false,
            bus_cycle_ns,
        }
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// `IA32_TSC_DEADLINE`; 0 outside TSC-deadline mode.
    pub fn tsc_deadline(&self) -> u64 {
        if self.mode == Mode::TscDeadline {
            self.deadline
        } else {
            0
        }
    }

    /// When [`Self::fire`] wants to be called.
    pub fn alarm(&self) -> Option<u64> {
        self.alarm
    }

    /// Whether the timer has expired and the vCPU has not taken notice.
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// Forgets an expiry.
    pub fn clear_pending(&mut self) {
        self.pending = false;
    }

    /// Stops it. The registers keep their values.
    pub fn cancel(&mut self) {
        self.alarm = None;
        self.pending = false;
    }

    /// Stops the host's timer only; an expiry that happened stays.
    pub fn stop(&mut self) {
        self.alarm = None;
    }

    /// The LVT entry was written. Tells whether the initial count must become 0, as it does on
    /// the way into and out of TSC-deadline mode.
    pub fn set_mode(&mut self, mode: Mode) -> InitialCount {
        if mode == self.mode {
            return InitialCount::Stays;
        }
        let crosses = (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline);
        if crosses {
            self.cancel();
            self.period = 0;
            self.deadline = 0;
        }
        self.mode = mode;
        self.limit_frequency();
        if crosses {
            InitialCount::BecomesZero
        } else {
            InitialCount::Stays
        }
    }

    /// Takes the divide configuration without effect on a running timer (reset and restore).
    pub fn load_divide(&mut self, tdcr: u32) {
        self.divide = divisor(tdcr);
    }

    /// The divide configuration was written: a running timer goes on at the new rate.
    pub fn set_divide(&mut self, tdcr: u32, tmict: u32, now: Now) {
        let old = u64::from(self.divide);
        self.divide = divisor(tdcr);
        if u64::from(self.divide) == old || self.period == 0 {
            return;
        }
        self.alarm = None;
        self.period = self.ns(tmict);
        self.limit_frequency();
        let remaining = u128::from(self.target.saturating_sub(now.ns));
        let remaining = remaining * u128::from(self.divide) / u128::from(old);
        self.target = now.ns.saturating_add(remaining as u64);
        self.start(now);
    }

    /// The initial count was written (not in TSC-deadline mode, where that does nothing).
    pub fn set_initial_count(&mut self, tmict: u32, now: Now) {
        self.cancel();
        if !self.mode.counts() {
            self.start(now);
        } else if self.load_period(tmict) {
            self.target = now.ns.saturating_add(self.period);
            self.start(now);
        }
    }

    /// `KVM_SET_LAPIC`: goes on from the current count `tmcct`.
    pub fn restore(&mut self, tmict: u32, tmcct: u32, now: Now) {
        self.pending = false;
        if self.mode.counts() {
            if !self.load_period(tmict) {
                return;
            }
            self.target = now.ns.saturating_add(self.remaining_of(tmcct));
        }
        self.start(now);
    }

    fn remaining_of(&self, tmcct: u32) -> u64 {
        match self.ns(tmcct) {
            0 if self.mode == Mode::Periodic => self.period,
            ns => ns.min(self.period),
        }
    }

    fn load_period(&mut self, tmict: u32) -> bool {
        self.period = self.ns(tmict);
        if self.period == 0 {
            self.deadline = 0;
            return false;
        }
        self.limit_frequency();
        true
    }

    /// `IA32_TSC_DEADLINE` was written in TSC-deadline mode.
    pub fn set_tsc_deadline(&mut self, deadline: u64, now: Now) {
        self.alarm = None;
        self.pending = false;
        self.deadline = deadline;
        self.start(now);
    }

    /// Starts the host's timer for what the registers say.
    fn start(&mut self, now: Now) {
        match self.mode {
            Mode::OneShot | Mode::Periodic => self.start_count(now),
            Mode::TscDeadline => self.start_deadline(now),
            Mode::Reserved => {}
        }
    }

    fn start_count(&mut self, now: Now) {
        if self.period == 0 || (self.pending && self.mode == Mode::OneShot) {
            return;
        }
        if now.ns > self.target {
            self.pending = true;
            if self.mode == Mode::OneShot {
                return;
            }
            self.advance(now);
        }
        self.alarm = Some(self.target);
    }

    fn start_deadline(&mut self, now: Now) {
        if self.deadline == 0 || now.tsc_khz == 0 || self.pending {
            return;
        }
        if self.deadline > now.tsc {
            self.alarm = Some(now.when_tsc_reaches(self.deadline));
        } else {
            self.pending = true;
        }
    }

    /// The alarm went off, or somebody looks whether it should have. Answers whether the timer
    /// has expired just now.
    pub fn fire(&mut self, now: Now) -> bool {
        match self.alarm {
            Some(alarm) if alarm <= now.ns => {}
            _ => return false,
        }
        let news = !self.pending;
        self.pending = true;
        if self.mode == Mode::Periodic {
            self.advance(now);
            self.alarm = Some(self.target);
        } else {
            self.alarm = None;
        }
        news
    }

    /// The next period. Missed periods are not caught up.
    fn advance(&mut self, now: Now) {
        self.target = self.target.saturating_add(self.period).max(now.ns);
    }

    /// The vCPU has turned the expiry into an interrupt.
    pub fn acknowledge(&mut self) {
        self.pending = false;
        match self.mode {
            Mode::TscDeadline => self.deadline = 0,
            Mode::OneShot => {
                self.deadline = 0;
                self.target = 0;
            }
            Mode::Periodic | Mode::Reserved => {}
        }
    }

    /// The current count register.
    pub fn current_count(&self, tmict: u32, now: Now) -> u32 {
        if self.mode == Mode::TscDeadline || tmict == 0 || self.period == 0 {
            return 0;
        }
        let remaining = self.target.saturating_sub(now.ns) % self.period;
        (remaining / (self.bus_cycle_ns * u64::from(self.divide))) as u32
    }

    fn ns(&self, count: u32) -> u64 {
        u64::from(count) * self.bus_cycle_ns * u64::from(self.divide)
    }

    fn limit_frequency(&mut self) {
        if self.mode == Mode::Periodic && self.period != 0 {
            self.period = self.period.max(MIN_PERIOD_NS);
        }
    }
}

/// What a change of mode means for the initial count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitialCount {
    /// Nothing.
    Stays,
    /// The register is cleared.
    BecomesZero,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ns: u64) -> Now {
        Now {
            ns,
            tsc: ns * 2,
            tsc_khz: 2_000_000,
        }
    }

    #[test]
    fn one_shot_counts_down_once() {
        let mut timer = Timer::new(1);
        timer.set_initial_count(1_000_000, at(0));
        assert_eq!(timer.alarm(), Some(2_000_000), "divided by 2 after reset");
        assert_eq!(timer.current_count(1_000_000, at(500_000)), 750_000);
        assert!(!timer.fire(at(1_999_999)));
        assert!(timer.fire(at(2_000_000)));
        assert!(timer.is_pending());
        timer.acknowledge();
        assert_eq!(timer.alarm(), None);
        assert_eq!(timer.current_count(1_000_000, at(2_000_001)), 0);
    }

    #[test]
    fn periodic_neither_catches_up_nor_runs_faster_than_the_limit() {
        let mut timer = Timer::new(1);
        assert_eq!(timer.set_mode(Mode::Periodic), InitialCount::Stays);
        timer.set_initial_count(10, at(0));
        assert_eq!(timer.alarm(), Some(MIN_PERIOD_NS));
        assert!(timer.fire(at(1_000_000)));
        assert_eq!(
            timer.alarm(),
            Some(1_000_000),
            "the past becomes the present"
        );
        assert!(!timer.fire(at(1_000_000)), "still pending: coalesced");
        assert_eq!(timer.alarm(), Some(1_200_000));
    }

    #[test]
    fn tsc_deadline() {
        let mut timer = Timer::new(1);
        timer.set_initial_count(1000, at(0));
        assert_eq!(timer.set_mode(Mode::TscDeadline), InitialCount::BecomesZero);
        assert_eq!(timer.alarm(), None);
        timer.set_tsc_deadline(5000, at(1000));
        assert_eq!((timer.alarm(), timer.tsc_deadline()), (Some(2500), 5000));
        assert!(timer.fire(at(2500)));
        timer.acknowledge();
        assert_eq!(timer.tsc_deadline(), 0);
        timer.set_tsc_deadline(1, at(3000));
        assert!(timer.is_pending(), "a deadline in the past expires at once");
        timer.set_tsc_deadline(0, at(3000));
        assert!(!timer.is_pending() && timer.alarm().is_none(), "0 disarms");
    }

    #[test]
    fn a_new_divisor_stretches_the_rest() {
        let mut timer = Timer::new(1);
        timer.load_divide(0xb);
        timer.set_initial_count(1_000_000, at(0));
        timer.set_divide(0x3, 1_000_000, at(250_000));
        assert_eq!(timer.alarm(), Some(250_000 + 750_000 * 16));
        assert_eq!(timer.current_count(1_000_000, at(250_000)), 750_000);
    }

    #[test]
    fn restore_goes_on_from_the_current_count() {
        let mut timer = Timer::new(1);
        timer.load_divide(0xb);
        timer.restore(1000, 400, at(50));
        assert_eq!(timer.alarm(), Some(450));
        timer.cancel();
        timer.restore(1000, 4000, at(50));
        assert_eq!(
            timer.alarm(),
            Some(1050),
            "never more than the initial count"
        );
        timer.cancel();
        timer.restore(1000, 0, at(50));
        assert_eq!(timer.alarm(), Some(50), "a one-shot timer that had run out");
        timer.cancel();
        timer.restore(0, 0, at(50));
        assert_eq!(timer.alarm(), None);
    }
}
