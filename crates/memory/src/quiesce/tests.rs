use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use super::*;

/// A request word as the CPU's: set by kicks, polled by its thread.
#[derive(Default)]
struct Word(AtomicU32);

impl Kick for Word {
    fn kick(&self, requests: Requests) {
        self.0.fetch_or(requests.bits(), Ordering::SeqCst);
    }
}

#[test]
fn a_participant_outside_is_not_waited_for() {
    let domain = Domain::new();
    let word = Arc::new(Word::default());
    let vcpu = domain.register(word.clone());
    assert!(
        domain
            .request_and_wait(Requests::FLUSH_TLB, None)
            .is_empty()
    );
    assert_eq!(word.0.load(Ordering::SeqCst), Requests::FLUSH_TLB.bits());
    domain.request(Requests::EVENT);
    assert_eq!(vcpu.enter(), Requests::FLUSH_TLB | Requests::EVENT);
    assert_eq!(vcpu.checkpoint(), Requests::empty());
    vcpu.leave();
}

#[test]
fn the_waiter_itself_counts_as_outside() {
    let domain = Domain::new();
    let vcpu = domain.register(Arc::new(Word::default()));
    assert!(vcpu.enter().is_empty());
    let asked = domain.request_and_wait(Requests::FLUSH_TLB, Some(&vcpu));
    assert!(asked.is_empty(), "it does not ask itself");
    assert!(vcpu.is_inside());
    vcpu.leave();
}

#[test]
fn a_dropped_participant_is_forgotten() {
    let domain = Domain::new();
    let vcpu = domain.register(Arc::new(Word::default()));
    vcpu.enter();
    drop(vcpu);
    assert!(domain.request_and_wait(Requests::EXIT, None).is_empty());
}

#[test]
fn two_waiters_inside_do_not_wait_for_each_other() {
    const ROUNDS: usize = 2000;
    let domain = Domain::new();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let vcpu = domain.register(Arc::new(Word::default()));
                vcpu.enter();
                for _ in 0..ROUNDS {
                    let _ = domain.request_and_wait(Requests::FLUSH_TLB, Some(&vcpu));
                    vcpu.checkpoint();
                }
                vcpu.leave();
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    assert_eq!(done.load(Ordering::SeqCst), 2);
}

/// What readers and the writer of the next test share.
struct Shared {
    /// Used in turn, so that a spoilt one stays so for some rounds.
    places: [AtomicU64; PLACES],
    published: AtomicUsize,
    reads: AtomicUsize,
    stop: AtomicBool,
}

const PLACES: usize = 16;
const SPOILT: u64 = u64::MAX;

impl Shared {
    const fn new() -> Self {
        Self {
            places: [const { AtomicU64::new(0) }; PLACES],
            published: AtomicUsize::new(0),
            reads: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        }
    }

    /// Enters, uses what it found until it is asked to drop it, leaves.
    fn stay(&self, vcpu: &Participant, word: &Word) {
        word.0.store(0, Ordering::SeqCst);
        vcpu.enter();
        let mut tlb = self.published.load(Ordering::Relaxed);
        for _ in 0..100 {
            // A stretch of guest code between two polls, longer than a writer that would not wait.
            for _ in 0..100 {
                assert_ne!(self.places[tlb].load(Ordering::Relaxed), SPOILT);
            }
            self.reads.fetch_add(100, Ordering::Relaxed);
            if word.0.load(Ordering::Relaxed) != 0 {
                word.0.store(0, Ordering::SeqCst);
                vcpu.checkpoint();
                tlb = self.published.load(Ordering::Relaxed);
            }
        }
        vcpu.leave();
    }
}

/// Readers copy a published place into a private one ("TLB") and use it until told otherwise; after
/// each wait the writer spoils the place that it has replaced. A reader that sees a spoilt place has
/// been missed.
#[test]
fn no_reader_uses_what_a_writer_has_replaced() {
    const ROUNDS: usize = 3000;
    const READS: usize = 10_000_000;
    let domain = Domain::new();
    let shared = Shared::new();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let word = Arc::new(Word::default());
                let vcpu = domain.register(word.clone());
                while !shared.stop.load(Ordering::Relaxed) {
                    shared.stay(&vcpu, &word);
                }
            });
        }
        let mut round = 0;
        while round < ROUNDS || shared.reads.load(Ordering::Relaxed) < READS {
            round += 1;
            shared.places[round % PLACES].store(round as u64, Ordering::Relaxed);
            shared.published.store(round % PLACES, Ordering::Release);
            let nobody = domain.request_and_wait(Requests::FLUSH_TLB, None);
            assert!(nobody.is_empty());
            shared.places[(round - 1) % PLACES].store(SPOILT, Ordering::Relaxed);
        }
        shared.stop.store(true, Ordering::Relaxed);
    });
}

/// One vCPU of the next test: a reader of what both publish, and a writer of its own places.
struct Both<'a> {
    me: usize,
    shared: &'a [Shared; 2],
    word: Arc<Word>,
    tlb: [usize; 2],
}

impl Both<'_> {
    /// Looks everything up anew where anything was asked.
    fn handle(&mut self, asked: Requests) {
        if !asked.is_empty() {
            self.tlb = self
                .shared
                .each_ref()
                .map(|s| s.published.load(Ordering::Relaxed));
        }
    }

    fn poll(&mut self, vcpu: &Participant) {
        for (shared, place) in self.shared.iter().zip(self.tlb) {
            assert_ne!(shared.places[place].load(Ordering::Relaxed), SPOILT);
            shared.reads.fetch_add(1, Ordering::Relaxed);
        }
        if self.word.0.load(Ordering::Relaxed) != 0 {
            self.word.0.store(0, Ordering::SeqCst);
            let asked = vcpu.checkpoint();
            self.handle(asked);
        }
    }

    /// Replaces its own place while inside.
    fn replace(&mut self, round: usize, domain: &Domain, vcpu: &Participant) {
        let mine = &self.shared[self.me];
        mine.places[round % PLACES].store(round as u64, Ordering::Relaxed);
        mine.published.store(round % PLACES, Ordering::Release);
        let asked = domain.request_and_wait(Requests::FLUSH_TLB, Some(vcpu));
        // Its own request is not among them: it knows what it did.
        self.tlb[self.me] = round % PLACES;
        self.handle(asked);
        mine.places[(round - 1) % PLACES].store(SPOILT, Ordering::Relaxed);
    }
}

/// Two vCPUs that replace tables from inside guest mode, each under the other's eyes.
#[test]
fn writers_inside_guest_mode_are_told_what_others_replaced() {
    const ROUNDS: usize = 200_000;
    const POLLS: usize = 5;
    let domain = Domain::new();
    let shared = [const { Shared::new() }; 2];
    let both_here = std::sync::Barrier::new(2);
    thread::scope(|scope| {
        for me in 0..2 {
            let (domain, shared, both_here) = (&domain, &shared, &both_here);
            scope.spawn(move || {
                let word = Arc::new(Word::default());
                let vcpu = domain.register(word.clone());
                let mut both = Both {
                    me,
                    shared,
                    word,
                    tlb: [0; 2],
                };
                both_here.wait();
                both.handle(vcpu.enter() | Requests::FLUSH_TLB);
                for round in 1..=ROUNDS {
                    (0..POLLS).for_each(|_| both.poll(&vcpu));
                    both.replace(round, domain, &vcpu);
                }
                vcpu.leave();
            });
        }
    });
    let reads = shared[0].reads.load(Ordering::Relaxed);
    assert_eq!(reads, 2 * POLLS * ROUNDS);
}

/// Each counts up a number that no lock protects, alone; and reads it, when it isn't.
#[test]
fn who_is_alone_is_alone() {
    const ROUNDS: u64 = 3000;
    let domain = Domain::new();
    let number = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let word = Arc::new(Word::default());
                let vcpu = domain.register(word.clone());
                let asked = vcpu.enter();
                let _ = domain.settle(&vcpu, asked);
                for _ in 0..ROUNDS {
                    let (alone, _) = domain.stop_others(&vcpu);
                    let before = number.load(Ordering::Relaxed);
                    std::hint::spin_loop();
                    number.store(before + 1, Ordering::Relaxed);
                    drop(alone);
                    // Nothing changes between two polls.
                    let seen = number.load(Ordering::Relaxed);
                    assert_eq!(number.load(Ordering::Relaxed), seen);
                    if word.0.swap(0, Ordering::SeqCst) != 0 {
                        let asked = vcpu.checkpoint();
                        let _ = domain.settle(&vcpu, asked);
                    }
                }
                vcpu.leave();
            });
        }
    });
    assert_eq!(number.load(Ordering::Relaxed), 3 * ROUNDS);
}
