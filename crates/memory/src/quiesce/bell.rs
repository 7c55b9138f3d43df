//! How a vCPU that runs guest code notices that it is wanted.
//!
//! Translated code polls one word, by a plain load: nothing costs less. The word says nothing but
//! *look*; what is wanted is in the [`Participant`]'s word, or in the bell's own. Who wants something
//! says what, then rings. The vCPU silences the bell, then takes what is wanted, by a
//! read-modify-write: one that comes too late for that has seen the bell silenced, and its ring stays.

use std::sync::Arc;

use super::{Participant, Requests};
use crate::sync::{AtomicU32, Ordering};

/// Where the polled word lies.
pub trait Polled {
    /// Zero asks the vCPU to look.
    fn go(&self) -> &AtomicU32;
}

/// See the module. All but [`Self::enter`] and [`Self::checkpoint`] may be called anywhere, in a signal
/// handler too.
#[derive(Debug)]
pub struct Bell<P> {
    wanted: AtomicU32,
    polled: Arc<P>,
}

impl<P: Polled> Bell<P> {
    /// Nothing is wanted.
    pub fn new(polled: Arc<P>) -> Self {
        Self {
            wanted: AtomicU32::new(0),
            polled,
        }
    }

    /// Asks this vCPU for these.
    pub fn request(&self, requests: Requests) {
        self.wanted.fetch_or(requests.bits(), Ordering::AcqRel);
        self.ring();
    }

    /// Takes back requests that were not seen yet.
    pub fn withdraw(&self, requests: Requests) {
        self.wanted.fetch_and(!requests.bits(), Ordering::AcqRel);
    }

    /// Has the vCPU look what is wanted.
    pub fn ring(&self) {
        self.polled.go().store(0, Ordering::Release);
    }

    /// Whether it rang since the vCPU looked last.
    #[inline]
    pub fn is_rung(&self) -> bool {
        self.polled.go().load(Ordering::Relaxed) == 0
    }

    /// [`Participant::enter`], with what this vCPU alone was asked for.
    pub fn enter(&self, participant: &Participant) -> Requests {
        self.silence();
        participant.enter() | self.take()
    }

    /// [`Participant::checkpoint`], with what this vCPU alone was asked for.
    pub fn checkpoint(&self, participant: &Participant) -> Requests {
        self.silence();
        participant.checkpoint() | self.take()
    }

    pub(crate) fn silence(&self) {
        self.polled.go().store(1, Ordering::Release);
    }

    /// Always a read-modify-write: a load might miss what was asked before the bell was silenced.
    fn take(&self) -> Requests {
        Requests::from_bits_truncate(self.wanted.swap(0, Ordering::AcqRel))
    }
}
