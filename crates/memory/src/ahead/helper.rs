//! A thread that provides pages in front of a vCPU while the vCPU provides some itself.
//!
//! Providing a page is nearly all zeroing, which two processors do in half the time. The thread takes
//! one order at a time; a vCPU that finds it busy goes on alone.
//!
//! An order is a stay in guest mode of the thread's own [`Participant`]: the vCPU enters for it while
//! it is itself inside, the thread leaves when it is done. So whoever changes memslots waits for an
//! order as for a vCPU, and after that the monitor may unmap. An order that has not begun is taken
//! back by the kick.
//!
//! | state     | meaning                       | next                                          |
//! |-----------|-------------------------------|-----------------------------------------------|
//! | `IDLE`    | nothing to do                 | `CLAIMED` by a vCPU                           |
//! | `CLAIMED` | a vCPU writes the order       | `ORDERED`                                     |
//! | `ORDERED` | waits for the thread          | `BUSY` by the thread, `CLAIMED` by the kick   |
//! | `BUSY`    | the thread provides pages     | `IDLE`                                        |

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;

use super::host;
use crate::quiesce::{Domain, Kick, Participant, Requests};

const IDLE: u32 = 0;
const CLAIMED: u32 = 1;
const ORDERED: u32 = 2;
const BUSY: u32 = 3;

/// The thread, for all vCPUs of one VM; started by the first order.
pub struct Helper {
    shared: Arc<Shared>,
    thread: OnceLock<Option<Thread>>,
}

struct Shared {
    state: AtomicU32,
    first: AtomicU64,
    pages: AtomicU64,
    ended: AtomicBool,
    participant: OnceLock<Weak<Participant>>,
}

impl Helper {
    /// For the VM of this domain; does not start the thread.
    pub fn new() -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU32::new(IDLE),
            first: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            participant: OnceLock::new(),
        });
        Self {
            shared,
            thread: OnceLock::new(),
        }
    }

    /// Has the thread provide pages from page number `first` on, unless it is busy. The caller is in
    /// guest mode.
    pub(super) fn order(&self, domain: &Domain, first: u64, pages: u64) -> Option<()> {
        let thread = self.thread.get_or_init(|| start(&self.shared, domain));
        let thread = thread.as_ref()?;
        let participant = self.shared.participant()?;
        self.shared.step(IDLE, CLAIMED)?;
        self.shared.first.store(first, Ordering::Relaxed);
        self.shared.pages.store(pages, Ordering::Relaxed);
        participant.enter();
        self.shared.state.store(ORDERED, Ordering::Release);
        thread.unpark();
        Some(())
    }
}

impl Default for Helper {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(Some(thread)) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// Nothing where the host has no second processor, or no thread to give.
fn start(shared: &Arc<Shared>, domain: &Domain) -> Option<Thread> {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return None;
    }
    let kick: Arc<dyn Kick> = Arc::<Shared>::clone(shared);
    let participant = domain.register(kick);
    shared.participant.set(Arc::downgrade(&participant)).ok()?;
    let orders = Arc::clone(shared);
    let _signals = host::Blocked::all();
    let thread = std::thread::Builder::new()
        .name("kvm-ahead".into())
        .spawn(move || orders.run(&participant));
    thread.ok().map(|handle| handle.thread().clone())
}

impl Shared {
    fn participant(&self) -> Option<Arc<Participant>> {
        self.participant.get()?.upgrade()
    }

    fn step(&self, from: u32, to: u32) -> Option<()> {
        self.state
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
            .ok()
            .map(drop)
    }

    fn run(&self, participant: &Participant) {
        while !self.ended.load(Ordering::Acquire) {
            if self.step(ORDERED, BUSY).is_none() {
                std::thread::park();
                continue;
            }
            self.provide(participant);
            participant.leave();
            self.state.store(IDLE, Ordering::Release);
        }
    }

    fn provide(&self, participant: &Participant) {
        let first = self.first.load(Ordering::Relaxed);
        let pages = self.pages.load(Ordering::Relaxed);
        super::provide(first, pages, || participant.has_requests());
    }
}

impl Kick for Shared {
    fn kick(&self, _: Requests) {
        // Nobody is to wait until the thread gets a processor.
        if self.step(ORDERED, CLAIMED).is_some() {
            if let Some(participant) = self.participant() {
                participant.leave();
            }
            self.state.store(IDLE, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::PAGE;
    use super::super::tests::{fresh, resident};
    use super::*;

    #[test]
    fn an_order_is_done_or_taken_back_when_a_writer_has_waited() {
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            println!("SKIPPED: one processor: there is no helper");
            return;
        }
        let (ram, domain, helper) = (fresh(8 << 20), Domain::new(), Helper::new());
        let first = ram.range().start().raw() / PAGE;
        for round in 0..200 {
            let before = resident(&ram);
            helper.order(&domain, first, 512).expect("it is idle");
            let _ = domain.request_and_wait(Requests::FLUSH_TLB, None);
            let there = resident(&ram);
            std::thread::yield_now();
            assert_eq!(resident(&ram), there, "nothing comes after the writer");
            assert!(there >= before, "round {round}");
            while helper.shared.state.load(Ordering::Acquire) != IDLE {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn an_order_that_nobody_disturbs_is_done() {
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            println!("SKIPPED: one processor: there is no helper");
            return;
        }
        let (ram, domain, helper) = (fresh(8 << 20), Domain::new(), Helper::new());
        let first = ram.range().start().raw() / PAGE;
        helper.order(&domain, first + 3, 500).expect("it is idle");
        while helper.shared.state.load(Ordering::Acquire) != IDLE {
            std::thread::yield_now();
        }
        assert_eq!(resident(&ram), 500);
    }
}
