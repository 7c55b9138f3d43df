//! A vCPU, as those see it who replace what it reads.

use std::sync::Arc;

use super::word::{Asked, Awaited, StateWord};
use super::{Kick, Requests};
use crate::sync::{Condvar, Mutex, lock, spin_loop, wait};

/// One vCPU, as seen by writers. Used by one thread at a time; the methods take `&self` because
/// writers hold it, too.
pub struct Participant {
    kick: Arc<dyn Kick>,
    word: StateWord,
    /// Held by who decides to sleep, and taken by who wakes: nobody is woken before sleeping.
    sleep: Mutex<()>,
    progress: Condvar,
}

impl Participant {
    /// Outside.
    pub(super) fn new(kick: Arc<dyn Kick>) -> Self {
        Self {
            kick,
            word: StateWord::new(),
            sleep: Mutex::new(()),
            progress: Condvar::new(),
        }
    }

    /// Enters guest mode. Returns (and takes) the requests made while it was outside.
    #[inline]
    pub fn enter(&self) -> Requests {
        debug_assert!(!self.is_inside(), "entered twice");
        // Nobody sleeps for the sake of a participant outside.
        self.word.take_turn().0
    }

    /// Leaves guest mode.
    #[inline]
    pub fn leave(&self) {
        debug_assert!(self.is_inside(), "left twice");
        self.wake(self.word.leave());
    }

    /// Passes a checkpoint: the caller holds nothing any more. Returns (and takes) the requests.
    #[inline]
    pub fn checkpoint(&self) -> Requests {
        debug_assert!(self.is_inside(), "a checkpoint outside guest mode");
        let (requests, awaited) = self.word.take_turn();
        self.wake(awaited);
        requests
    }

    /// Whether it is in guest mode.
    pub fn is_inside(&self) -> bool {
        self.word.is_inside()
    }

    /// Whether requests wait for it.
    pub fn has_requests(&self) -> bool {
        self.word.has_requests()
    }

    /// Asks this participant alone, without waiting.
    pub fn request(&self, requests: Requests) {
        self.ask(requests);
    }

    pub(super) fn ask(&self, requests: Requests) -> Asked {
        let asked = self.word.ask(requests);
        self.kick.kick(requests);
        asked
    }

    #[inline]
    fn wake(&self, awaited: Awaited) {
        if awaited == Awaited::Yes {
            self.wake_all();
        }
    }

    #[cold]
    fn wake_all(&self) {
        drop(lock(&self.sleep));
        self.progress.notify_all();
    }

    /// Returns when it holds nothing any more that it held when it was asked.
    pub(super) fn wait_for(&self, asked: Asked) {
        const SPINS: u32 = if cfg!(loom) { 0 } else { 200 };
        for _ in 0..SPINS {
            if self.word.has_passed(asked) {
                return;
            }
            spin_loop();
        }
        let mut guard = lock(&self.sleep);
        while !self.word.await_step(asked) {
            guard = wait(&self.progress, guard);
        }
    }
}
