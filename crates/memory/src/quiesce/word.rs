//! The one word in which a participant and its writers tell each other everything.
//!
//! | bits  | meaning                                                     | changed by             |
//! |-------|-------------------------------------------------------------|------------------------|
//! | 0-15  | [`Requests`] that wait                                      | writers set, it clears |
//! | 16    | inside                                                      | the participant        |
//! | 17    | a writer sleeps until the participant's next step           | writers set, it clears |
//! | 18-63 | turns: counted up by every step that takes the requests     | the participant        |
//!
//! Every step is one read-modify-write of this word, and those of one word have one order which all
//! threads agree on, whatever else they may see in which order. So a writer that finds the
//! participant outside comes before its next entry, which takes the writer's bits; and one that finds
//! it inside waits for another turn, or for it to leave: steps that come behind its own. Each step
//! acquires what was done before the steps in front of it, and releases what was done before it. No
//! other word has to be compared with this one, so that nothing has to be sequentially consistent:
//! what the compiler and the processor may reorder, `models` has tried.

use super::Requests;
use crate::sync::{AtomicU64, Ordering};

const REQUESTS: u64 = 0xffff;
const INSIDE: u64 = 1 << 16;
const AWAITED: u64 = 1 << 17;
const TURN: u64 = 1 << 18;
const TURNS: u64 = !(TURN - 1);

const _: () = assert!(Requests::all().bits() as u64 & !REQUESTS == 0);

/// See the module.
pub(super) struct StateWord(AtomicU64);

/// What the word was when a writer left its requests.
#[derive(Clone, Copy)]
pub(super) struct Asked(u64);

/// Whether a step of the participant ends somebody's wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    Yes,
    No,
}

impl StateWord {
    /// Outside, with no requests.
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A writer's: leaves requests.
    pub(super) fn ask(&self, requests: Requests) -> Asked {
        Asked(self.0.fetch_or(requests.bits().into(), Ordering::AcqRel))
    }

    /// A writer's: whether the participant holds nothing any more that it held at `asked`.
    pub(super) fn has_passed(&self, asked: Asked) -> bool {
        Self::passed(asked, self.0.load(Ordering::Acquire))
    }

    /// The same; where not, the participant's next step will say that it is awaited.
    pub(super) fn await_step(&self, asked: Asked) -> bool {
        Self::passed(asked, self.0.fetch_or(AWAITED, Ordering::AcqRel))
    }

    fn passed(asked: Asked, now: u64) -> bool {
        asked.0 & INSIDE == 0 || now & INSIDE == 0 || (asked.0 ^ now) & TURNS != 0
    }

    /// The participant's: goes inside, or stays there without anything it held; takes the requests.
    pub(super) fn take_turn(&self) -> (Requests, Awaited) {
        // Nobody else changes the turns: what this thread knows of them is how they are.
        let turn = (self.0.load(Ordering::Relaxed) & TURNS).wrapping_add(TURN);
        let before = self.0.swap(turn | INSIDE, Ordering::AcqRel);
        (requests(before), awaited(before))
    }

    /// The participant's: goes outside. Requests stay.
    pub(super) fn leave(&self) -> Awaited {
        awaited(self.0.fetch_and(!(INSIDE | AWAITED), Ordering::Release))
    }

    pub(super) fn is_inside(&self) -> bool {
        self.0.load(Ordering::Acquire) & INSIDE != 0
    }

    pub(super) fn has_requests(&self) -> bool {
        self.0.load(Ordering::Relaxed) & REQUESTS != 0
    }
}

fn requests(word: u64) -> Requests {
    Requests::from_bits_truncate((word & REQUESTS) as u32)
}

fn awaited(word: u64) -> Awaited {
    if word & AWAITED == 0 {
        Awaited::No
    } else {
        Awaited::Yes
    }
}
