//! How a machine ends, and how its threads tell each other.

use std::{
    fmt,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use addr::Gva;
use devices::power::{PowerEvent, PowerSink};

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched it off.
    PowerOff,
    /// The guest reset it.
    Reset,
    /// The monitor's user stopped it.
    Stopped,
    /// It can't go on.
    Crashed(Crash),
}

/// Why it can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Which vCPU.
    pub cpu: u8,
    /// Where it was, if that could be read.
    pub rip: Option<Gva>,
    /// What happened.
    pub cause: String,
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}", self.cpu)?;
        if let Some(rip) = self.rip {
            write!(f, " at {rip}")?;
        }
        write!(f, ": {}", self.cause)
    }
}

/// The first outcome that anybody reports.
#[derive(Default)]
pub(crate) struct Ending {
    outcome: Mutex<Option<Outcome>>,
    reported: Condvar,
}

impl Ending {
    /// Reports; the first report counts.
    pub(crate) fn report(&self, outcome: Outcome) {
        self.lock().get_or_insert(outcome);
        self.reported.notify_all();
    }

    /// Whether there is a report.
    pub(crate) fn is_reported(&self) -> bool {
        self.lock().is_some()
    }

    /// Waits for a report.
    pub(crate) fn wait(&self) -> Outcome {
        let mut outcome = self.lock();
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            let woken = self.reported.wait(outcome);
            outcome = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PowerSink for Ending {
    fn request(&self, event: PowerEvent) {
        self.report(match event {
            PowerEvent::PowerOff => Outcome::PowerOff,
            PowerEvent::Reset => Outcome::Reset,
        });
    }
}
