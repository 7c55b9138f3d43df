//! Marks against harvests: a page whose harvest came too early for a write is in the next one.

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::*;
use crate::dirty::DirtyBitmap;

fn pages(bitmap: &DirtyBitmap) -> u64 {
    bitmap.take().iter().map(|word| word.mask).sum()
}

/// The monitor, or the clock: writes, then marks, with nobody waiting for it.
#[test]
fn a_write_is_harvested_with_its_mark_or_later() {
    explore(4, || {
        let bitmap = Arc::new(DirtyBitmap::new(64).unwrap());
        let page = Arc::new(AtomicU32::new(0));
        bitmap.mark(5);
        let writer = {
            let (bitmap, page) = (Arc::clone(&bitmap), Arc::clone(&page));
            thread::spawn(move || {
                page.store(1, Ordering::Relaxed);
                bitmap.mark(5);
            })
        };
        assert_eq!(pages(&bitmap), 1 << 5);
        let sent = page.load(Ordering::Relaxed);
        writer.join().unwrap();
        let again = pages(&bitmap);
        assert!(sent == 1 || again == 1 << 5, "a write is lost");
    });
}

#[test]
fn two_markers_and_a_harvest() {
    explore(3, || {
        // Two words of one summary.
        let bitmap = Arc::new(DirtyBitmap::new(128).unwrap());
        let markers = [3, 64].map(|page| {
            let bitmap = Arc::clone(&bitmap);
            thread::spawn(move || assert!(bitmap.mark(page), "nobody else marks it"))
        });
        let first = bitmap.take();
        for marker in markers {
            marker.join().unwrap();
        }
        bitmap.check_invariants();
        let mut masks = [0_u64; 2];
        for word in first.into_iter().chain(bitmap.take()) {
            assert_eq!(masks[word.index] & word.mask, 0, "taken twice");
            masks[word.index] |= word.mask;
        }
        assert_eq!(masks, [1 << 3, 1]);
    });
}

/// A page of guest memory with its mark, and its entry in a second level that vCPUs share.
struct Logged {
    bitmap: DirtyBitmap,
    writes_allowed: AtomicU32,
    page: AtomicU32,
}

/// What a fault does first.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Entry,
    Mark,
}

/// What a harvest does last.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    Wait,
    Ask,
}

impl Logged {
    fn new() -> Self {
        Self {
            bitmap: DirtyBitmap::new(64).unwrap(),
            writes_allowed: AtomicU32::new(0),
            page: AtomicU32::new(0),
        }
    }

    /// As `mmu::fill`: the entry first, then the mark. A mark in front could be taken before there is
    /// an entry to protect.
    fn fill(&self, first: First) {
        if self.writes_allowed.load(Ordering::Acquire) != 0 {
            return;
        }
        if first == First::Mark {
            self.bitmap.mark(0);
        }
        self.writes_allowed.store(1, Ordering::Release);
        if first == First::Entry {
            self.bitmap.mark(0);
        }
    }

    /// Writes twice.
    fn run(&self, vcpu: &Vcpu, first: First) {
        let mut tlb = false;
        let _ = vcpu.enter();
        for value in 1..=2 {
            if !tlb {
                self.fill(first);
                tlb = true;
            }
            self.page.store(value, Ordering::Relaxed);
            if !vcpu.poll().is_empty() {
                tlb = false;
            }
        }
        vcpu.leave();
    }

    /// As `Slots::harvest`: takes the marks, protects those pages, waits. Whether the page was marked,
    /// and what is in it behind that.
    fn harvest(&self, domain: &Domain, last: Last) -> (bool, u32) {
        let taken = !self.bitmap.take().is_empty();
        if taken {
            self.writes_allowed.store(0, Ordering::Release);
            match last {
                Last::Wait => drop(domain.request_and_wait(Requests::FLUSH_TLB, None)),
                Last::Ask => domain.request(Requests::FLUSH_TLB),
            }
        }
        (taken, self.page.load(Ordering::Relaxed))
    }
}

fn migrate(preemptions: usize, first: First, last: Last) {
    explore(preemptions, move || {
        let domain = Domain::new();
        let logged = Arc::new(Logged::new());
        let vcpu = Vcpu::new(&domain);
        let guest = {
            let (logged, vcpu) = (Arc::clone(&logged), Arc::clone(&vcpu));
            thread::spawn(move || logged.run(&vcpu, first))
        };
        let (_, sent) = logged.harvest(&domain, last);
        guest.join().unwrap();
        let (again, written) = logged.harvest(&domain, last);
        assert!(again || sent == written, "a write is lost");
    });
}

/// The whole handshake: while its entry allows writes, a page is marked, or will be by a vCPU that
/// is inside.
#[test]
fn no_harvest_loses_a_write() {
    migrate(4, First::Entry, Last::Wait);
}

/// A rule broken on purpose.
#[test]
#[should_panic(expected = "a write is lost")]
fn a_mark_before_its_entry_is_found() {
    migrate(4, First::Mark, Last::Wait);
}

/// A rule broken on purpose.
#[test]
#[should_panic(expected = "a write is lost")]
fn a_harvest_that_does_not_wait_is_found() {
    migrate(4, First::Entry, Last::Ask);
}
