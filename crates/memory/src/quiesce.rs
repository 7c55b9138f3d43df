//! How a writer waits until no vCPU can hold what it has replaced.
//!
//! vCPU threads read shared tables (memory slots, second level, translated code) without a lock,
//! and keep what they found in TLBs. Somebody who replaces a table publishes the new one, then calls
//! [`Domain::request_and_wait`]: each vCPU that is in guest mode is asked to pass a *checkpoint*, at
//! which it drops what it derived from the old table. When the call returns, nobody can reach the
//! old one any more. It is the idea of the kernel's `kvm_make_all_cpus_request` with
//! `KVM_REQUEST_WAIT`, and of RCU with one critical section per stay in guest mode.
//!
//! A participant is in one of two states:
//!
//! | state   | what it may hold                         | a writer                              |
//! |---------|------------------------------------------|---------------------------------------|
//! | outside | nothing but what it will drop on entry   | does not wait; leaves its request     |
//! | inside  | translations, references, a slot table   | waits for `leave` or `checkpoint`     |
//!
//! # Why no request is lost
//! All that a participant and its writers tell each other is in one word, which each changes by one
//! read-modify-write (`word`). A writer publishes, sets its bits in that word, kicks, and waits where
//! it found the participant inside; a participant that goes inside or passes a checkpoint takes the
//! bits, and counts a turn. `cargo xtask loom` tries these handshakes in every order that the
//! language's memory model allows (`models`).
//!
//! # Rules for a participant
//! - Where [`Kick`] sets a word that it polls, it clears that word *before* it calls `enter` or
//!   `checkpoint`: cleared afterwards, a request that came in between would be lost ([`Bell`] does
//!   both).
//! - It must not block while inside (`HLT` leaves first): a writer would wait for it.
//! - It handles the requests that [`Participant::enter`], [`Participant::checkpoint`] and
//!   [`Domain::request_and_wait`] return *before* it uses anything from its TLB.
//! - Where the requests hold [`Requests::STOP`], it calls [`Domain::settle`] first of all.
//! - It may wait as a writer while inside, as `from`; meanwhile it counts as outside. It must not
//!   keep references from before the call.

mod bell;
mod participant;
mod word;

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, PoisonError, Weak};

pub use bell::{Bell, Polled};
pub use participant::Participant;
use word::Asked;

use crate::sync::{Condvar, Mutex, MutexGuard, UnmodelledMutex, lock, wait};

bitflags::bitflags! {
    /// What a vCPU is asked to do at its next checkpoint.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Requests: u32 {
        /// Drop all translations of addresses.
        const FLUSH_TLB = 1 << 0;
        /// Drop (or check again) translated code.
        const INVALIDATE_CODE = 1 << 1;
        /// Return to the monitor.
        const EXIT = 1 << 2;
        /// Look for interrupts and other events.
        const EVENT = 1 << 3;
        /// Stay outside until the one that is alone has done ([`Domain::stop_others`]).
        const STOP = 1 << 4;
        /// Compare translated code with memory again: a device may have written there.
        const CHECK_CODE = 1 << 5;
    }
}

/// Makes a vCPU notice: sets bits in the word that translated code polls.
///
/// Called from any thread, with no lock of the domain held.
pub trait Kick: Send + Sync {
    /// Asks the vCPU to call [`Participant::checkpoint`] soon. Must not block.
    fn kick(&self, requests: Requests);
}

/// One virtual machine's meeting place of readers and writers.
#[derive(Default)]
pub struct Domain {
    /// No other step is taken under it.
    members: UnmodelledMutex<Vec<Weak<Participant>>>,
    /// Whether a participant is alone in guest mode, or on its way to it.
    alone: Mutex<bool>,
    over: Condvar,
}

/// While it lives, no other participant does anything in guest mode.
pub struct Alone {
    domain: Arc<Domain>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        *self.domain.alone() = false;
        self.domain.over.notify_all();
    }
}

impl Domain {
    /// A domain without participants.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a participant, outside. It belongs to the domain until it is dropped.
    pub fn register(&self, kick: Arc<dyn Kick>) -> Arc<Participant> {
        let participant = Arc::new(Participant::new(kick));
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.retain(|m| m.strong_count() > 0);
        members.push(Arc::downgrade(&participant));
        participant
    }

    /// Asks every participant for `requests`, without waiting.
    pub fn request(&self, requests: Requests) {
        self.ask(requests, None);
    }

    /// Asks every participant but `from` for `requests` and returns when each of them was seen
    /// outside or has passed a checkpoint.
    ///
    /// With `from`, the caller is in that participant's thread; while it waits it counts as outside,
    /// so that two vCPUs which wait for each other both go on. The result is what others asked of
    /// `from` meanwhile: to be handled before it goes on (empty without `from`).
    ///
    /// `from` doesn't come back inside while another participant is alone: nothing that it does
    /// behind this call falls into the other's stay.
    #[must_use = "the requests to `from` must be handled"]
    pub fn request_and_wait(&self, requests: Requests, from: Option<&Participant>) -> Requests {
        let asked = self.ask(requests, from);
        let was_inside = from.filter(|p| p.is_inside());
        if let Some(p) = was_inside {
            p.leave();
        }
        for (participant, asked) in asked {
            participant.wait_for(asked);
        }
        was_inside.map_or(Requests::empty(), |p| self.settle(p, p.enter()))
    }

    /// Handles [`Requests::STOP`] among requests that `participant`, which is inside, was given: waits
    /// outside until nobody is alone. Returns what else is to be handled.
    #[must_use = "the requests must be handled"]
    pub fn settle(&self, participant: &Participant, mut requests: Requests) -> Requests {
        while requests.contains(Requests::STOP) {
            participant.leave();
            drop(self.wait_until_over());
            requests = requests.difference(Requests::STOP) | participant.enter();
        }
        requests
    }

    /// Keeps all other participants outside guest mode, or at a standstill in it, as long as the result
    /// lives; and what was asked of `from`, which is inside, meanwhile. One at a time: who comes second
    /// waits, and counts as outside.
    #[must_use = "the requests to `from` must be handled"]
    pub fn stop_others(self: &Arc<Self>, from: &Participant) -> (Alone, Requests) {
        from.leave();
        *self.wait_until_over() = true;
        let alone = Alone {
            domain: Arc::clone(self),
        };
        // A stop that was asked for before is over: only one is alone.
        let before = from.enter() - Requests::STOP;
        let late = self.request_and_wait(Requests::STOP, Some(from));
        (alone, before | late)
    }

    fn alone(&self) -> MutexGuard<'_, bool> {
        lock(&self.alone)
    }

    fn wait_until_over(&self) -> MutexGuard<'_, bool> {
        let mut alone = self.alone();
        while *alone {
            alone = wait(&self.over, alone);
        }
        alone
    }

    /// Leaves the requests with everybody.
    fn ask(
        &self,
        requests: Requests,
        from: Option<&Participant>,
    ) -> Vec<(Arc<Participant>, Asked)> {
        let members: Vec<_> = {
            let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
            members.iter().filter_map(Weak::upgrade).collect()
        };
        // One that was just dropped is not asked: what it did before comes before what the caller does.
        fence(Ordering::Acquire);
        members
            .into_iter()
            .filter(|p| from.is_none_or(|f| !std::ptr::eq(f, &raw const **p)))
            .map(|p| {
                let asked = p.ask(requests);
                (p, asked)
            })
            .collect()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
