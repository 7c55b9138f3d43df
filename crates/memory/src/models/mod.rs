//! The handshakes between threads under every order of steps that the memory model of the language
//! allows, by loom: `cargo xtask loom`.
//!
//! What stands for guest memory, a page of tables or a block of code is a cell that is no atomic: loom
//! fails where two threads reach it and neither comes surely before the other. So a model says not
//! only that nobody *sees* something old, but that the handshake itself keeps the two apart.
//!
//! Some of the tests break a rule on purpose and expect to be told: a model that can't fail says
//! nothing.

#![expect(
    unsafe_code,
    reason = "loom's cells, which are there to find unordered accesses"
)]

mod bell;
mod code;
mod dirty;
mod quiesce;
mod slots;

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32;

use crate::quiesce::{Bell, Domain, Kick, Participant, Polled, Requests};

/// Runs a model under all orders with at most so many switches of a thread that could have gone on.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Something that no lock protects.
struct Place(UnsafeCell<u32>);

impl Place {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }

    fn read(&self) -> u32 {
        // SAFETY: loom panics where a write is not ordered before or behind this.
        self.0.with(|place| unsafe { *place })
    }

    fn write(&self, value: u32) {
        // SAFETY: loom panics where any access is not ordered before or behind this.
        self.0.with_mut(|place| unsafe { *place = value });
    }
}

/// The word that translated code polls.
struct Go(AtomicU32);

impl Polled for Go {
    fn go(&self) -> &AtomicU32 {
        &self.0
    }
}

/// A vCPU without a CPU: its bell and its place in the domain, and what it holds back.
struct Vcpu {
    bell: Arc<Ring>,
    participant: Arc<Participant>,
}

struct Ring(Bell<Go>);

impl Kick for Ring {
    fn kick(&self, _: Requests) {
        self.0.ring();
    }
}

impl Vcpu {
    /// To be kept until the model ends: the domain forgets who is dropped, and waits for it no more.
    fn new(domain: &Domain) -> Arc<Self> {
        let bell = Arc::new(Ring(Bell::new(Arc::new(Go(AtomicU32::new(1))))));
        let kick: Arc<dyn Kick> = Arc::<Ring>::clone(&bell);
        let participant = domain.register(kick);
        Arc::new(Self { bell, participant })
    }

    fn enter(&self) -> Requests {
        self.bell.0.enter(&self.participant)
    }

    /// As translated code: looks only where the bell rang.
    fn poll(&self) -> Requests {
        if self.bell.0.is_rung() {
            self.bell.0.checkpoint(&self.participant)
        } else {
            Requests::empty()
        }
    }

    fn leave(&self) {
        self.participant.leave();
    }
}
