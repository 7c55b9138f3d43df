//! Stopping all vCPUs between two instructions, and looking at them.
//!
//! ```text
//!   Gate::hold ─ asks, kicks ──► vCPU thread: KVM_RUN returns EINTR ─► parks in Gate::park
//!        │                                                              │  serves jobs
//!        └─ waits until all are parked ◄────────────────────────────────┘
//!   Hold::with_vcpu ── job ──► runs in that vCPU's thread
//!   drop(Hold) ── the last one lets them go on
//! ```
//!
//! A vCPU whose last exit was an access of a device is in the middle of an instruction: the
//! accelerator completes it at the next `KVM_RUN` (api.rst, 5, "`KVM_EXIT_MMIO`"). So a vCPU parks
//! only after a run that ended with `EINTR`, or before its first.
//!
//! Devices are not stopped: what a disk was asked for before still arrives.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use accel::{Kicker, Vcpu};

type Job = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

/// Where vCPU threads wait while somebody holds them.
#[derive(Default)]
pub(crate) struct Gate {
    /// Whether anybody holds; read by vCPU threads between two runs.
    asked: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    holds: usize,
    /// The machine has ended: nobody parks any more.
    closed: bool,
    /// By vCPU; none before its thread has started.
    vcpus: Vec<Option<Member>>,
}

struct Member {
    kicker: Arc<dyn Kicker>,
    place: Place,
    jobs: VecDeque<Job>,
}

/// Where a vCPU thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Running, or on its way to the gate.
    Running,
    /// At the gate: it serves jobs.
    Parked,
    /// Its thread has ended.
    Gone,
}

/// Why vCPUs could not be stopped or asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PauseError {
    /// A vCPU did not come out of the accelerator in time.
    #[error("vCPU {vcpu} did not stop within {} ms", patience.as_millis())]
    Busy {
        /// Which.
        vcpu: usize,
        /// How long was waited.
        patience: Duration,
    },
    /// There is no such vCPU, or its thread has ended.
    #[error("the machine has no running vCPU {vcpu}")]
    NoVcpu {
        /// Which was asked for.
        vcpu: usize,
    },
}

impl Gate {
    /// The thread of vCPU `index` begins.
    pub(crate) fn join(&self, index: u8, kicker: Arc<dyn Kicker>) {
        let index = usize::from(index);
        let mut state = self.lock();
        if state.vcpus.len() <= index {
            state.vcpus.resize_with(index + 1, || None);
        }
        state.vcpus[index] = Some(Member {
            kicker,
            place: Place::Running,
            jobs: VecDeque::new(),
        });
    }

    /// The thread of vCPU `index` has ended.
    pub(crate) fn leave(&self, index: u8) {
        if let Some(member) = self.lock().member(usize::from(index)) {
            member.place = Place::Gone;
            // Dropping a job tells who waits for it.
            member.jobs.clear();
        }
        self.changed.notify_all();
    }

    /// Whether somebody wants the vCPUs to stop.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Lets everybody go on for good: the machine ends.
    pub(crate) fn open_for_good(&self) {
        self.lock().closed = true;
        self.asked.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// In the thread of vCPU `index`, between two instructions: waits while anybody holds.
    pub(crate) fn park(&self, index: u8, vcpu: &mut dyn Vcpu) {
        let index = usize::from(index);
        let mut state = self.lock();
        while state.holds > 0 && !state.closed {
            let Some(member) = state.member(index) else {
                return;
            };
            member.place = Place::Parked;
            if let Some(job) = member.jobs.pop_front() {
                drop(state);
                job(vcpu);
                state = self.lock();
                continue;
            }
            self.changed.notify_all();
            state = self.wait(state);
        }
        if let Some(member) = state.member(index) {
            member.place = Place::Running;
        }
    }

    /// Stops all vCPUs for as long as the answer lives.
    pub(crate) fn hold(self: &Arc<Self>, patience: Duration) -> Result<Hold, PauseError> {
        const KICK_AGAIN: Duration = Duration::from_millis(1);
        let mut state = self.lock();
        state.holds += 1;
        self.asked.store(!state.closed, Ordering::Release);
        let hold = Hold { gate: self.clone() };
        let deadline = Instant::now() + patience;
        loop {
            let Some(vcpu) = state.first_running().filter(|_| !state.closed) else {
                return Ok(hold);
            };
            if Instant::now() >= deadline {
                drop(state);
                return Err(PauseError::Busy { vcpu, patience });
            }
            for member in state.vcpus.iter().flatten() {
                if member.place == Place::Running {
                    member.kicker.kick();
                }
            }
            let waited = self.changed.wait_timeout(state, KICK_AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn release(&self) {
        let mut state = self.lock();
        state.holds = state.holds.saturating_sub(1);
        if state.holds == 0 {
            self.asked.store(false, Ordering::Release);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let woken = self.changed.wait(state);
        woken.unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn member(&mut self, index: usize) -> Option<&mut Member> {
        self.vcpus.get_mut(index)?.as_mut()
    }

    /// A vCPU that may be in guest code.
    fn first_running(&self) -> Option<usize> {
        self.vcpus
            .iter()
            .position(|m| m.as_ref().is_some_and(|m| m.place == Place::Running))
    }
}

/// All vCPUs are stopped while this lives.
pub struct Hold {
    gate: Arc<Gate>,
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hold")
    }
}

impl Hold {
    /// Runs `look` in the thread of vCPU `index`.
    pub fn with_vcpu<T: Send + 'static>(
        &self,
        index: usize,
        look: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Result<T, PauseError> {
        let (answer, answered) = mpsc::channel();
        {
            let mut state = self.gate.lock();
            // One that has just begun comes to the gate before it runs anything.
            let member = state.member(index).filter(|m| m.place != Place::Gone);
            let member = member.ok_or(PauseError::NoVcpu { vcpu: index })?;
            member.jobs.push_back(Box::new(move |vcpu| {
                // Who asked may have gone.
                let _ = answer.send(look(vcpu));
            }));
        }
        self.gate.changed.notify_all();
        answered
            .recv()
            .map_err(|_| PauseError::NoVcpu { vcpu: index })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.gate.release();
    }
}
