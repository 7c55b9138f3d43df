//! Holding all vCPUs between two instructions, for those who look at a running machine.
//!
//! ```text
//!   Vm::hold ── counts itself, `look`s at each vCPU ──► the run loop sees `is_held`,
//!      │                                                gives the vCPU's lock back, waits
//!      └─ until each vCPU's lock was free once ◄────────┘
//!   drop(Hold) ── the last one wakes them; each takes its lock again and goes on
//! ```
//!
//! `KVM_RUN` holds its vCPU's lock while it runs guest code, and looks at the count after it has
//! taken the lock. So a lock that was free once while the count is above zero belongs to a vCPU that
//! runs no guest code before the count is zero again, whether its thread waits here or is the
//! program's own. All calls of the API work meanwhile; `KVM_RUN` waits, and a signal ends it as ever.
//!
//! Devices, timers and the program itself are not held.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::{Shared, Vm};
use crate::vcpu::Vcpu;

/// A vCPU did not come out of guest code in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {id} did not stop within {} ms", patience.as_millis())]
pub struct StillRuns {
    /// Which.
    pub id: u32,
    /// How long was waited.
    pub patience: Duration,
}

/// All vCPUs of a VM are held while this lives; it keeps the VM alive, too.
pub struct Hold(Arc<Vm>);

impl Hold {
    /// The VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.0
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.0.shared().holds.fetch_sub(1, Ordering::SeqCst) == 1 {
            for vcpu in self.0.vcpus() {
                vcpu.kicker().look();
            }
        }
    }
}

impl Shared {
    /// Whether anybody holds the vCPUs.
    pub(crate) fn is_held(&self) -> bool {
        self.holds.load(Ordering::SeqCst) > 0
    }
}

impl Vm {
    /// Stops all vCPUs between two instructions, for as long as the answer lives.
    pub fn hold(self: &Arc<Self>, patience: Duration) -> Result<Hold, StillRuns> {
        self.shared().holds.fetch_add(1, Ordering::SeqCst);
        let hold = Hold(Arc::clone(self));
        let deadline = Instant::now() + patience;
        let vcpus = self.vcpus();
        for vcpu in &vcpus {
            vcpu.kicker().look();
        }
        for vcpu in &vcpus {
            wait_for(vcpu, deadline).map_err(|id| StillRuns { id, patience })?;
        }
        Ok(hold)
    }
}

fn wait_for(vcpu: &Vcpu, deadline: Instant) -> Result<(), u32> {
    const PAUSE: Duration = Duration::from_micros(20);
    while !vcpu.is_free() {
        if Instant::now() >= deadline {
            return Err(vcpu.id());
        }
        // The look before may have come between two entries of guest code.
        vcpu.kicker().look();
        thread::sleep(PAUSE);
    }
    Ok(())
}
