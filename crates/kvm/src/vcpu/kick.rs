//! The ways to a vCPU's thread.
//!
//! | who calls                    | running guest code        | asleep in `HLT` | outside          |
//! |------------------------------|---------------------------|-----------------|------------------|
//! | a signal in the thread       | leaves, `EINTR`           | `EINTR`         | -                |
//! | [`Kicker::kick`]             | leaves, `EINTR`           | `EINTR`         | next run `EINTR` |
//! | an interrupt controller      | looks for the interrupt   | wakes           | -                |
//! | INIT, SIPI, NMI, an EOI      | the run loop looks        | wakes           | -                |

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cpu::VcpuKick;
use memory::quiesce::Requests;

use crate::irqchip::wake::{HaltGate, VcpuWake};
use crate::signals::Interrupt;

/// Reaches one vCPU from any thread, and from signal handlers.
#[derive(Default)]
pub struct Kicker {
    /// `KVM_RUN` is to return `EINTR`, once.
    exit: AtomicBool,
    /// Where the vCPU sleeps.
    gate: HaltGate,
    /// The word that translated code polls.
    cpu: OnceLock<Arc<VcpuKick>>,
}

impl Kicker {
    /// The run in progress, or else the next one, returns `EINTR`.
    pub fn kick(&self) {
        self.exit.store(true, Ordering::SeqCst);
        self.reach(Requests::EXIT);
    }

    /// The vCPU is to leave guest code and look around; the run goes on.
    pub(crate) fn look(&self) {
        self.reach(Requests::EXIT);
    }

    /// Takes a kick back that the run is about to answer.
    pub fn take(&self) -> bool {
        self.exit.swap(false, Ordering::SeqCst)
    }

    /// Whether a kick waits.
    pub fn is_kicked(&self) -> bool {
        self.exit.load(Ordering::SeqCst)
    }

    /// Where the vCPU sleeps.
    pub fn gate(&self) -> &HaltGate {
        &self.gate
    }

    /// Ties it to a CPU, once.
    pub fn connect(&self, cpu: Arc<VcpuKick>) {
        // A second CPU is never made for one vCPU.
        let _ = self.cpu.set(cpu);
    }

    fn reach(&self, requests: Requests) {
        self.gate.open();
        if let Some(cpu) = self.cpu.get() {
            cpu.request(requests);
        }
    }
}

impl Interrupt for Kicker {
    fn interrupt(&self) {
        // Not `kick`: the section remembers the signal itself.
        self.reach(Requests::EXIT);
    }
}

impl VcpuWake for Kicker {
    fn interrupt(&self) {
        self.reach(Requests::EVENT);
    }

    fn request(&self) {
        self.reach(Requests::EXIT);
    }

    fn memory_written(&self) {
        if let Some(cpu) = self.cpu.get() {
            cpu.request(Requests::CHECK_CODE);
        }
    }
}
