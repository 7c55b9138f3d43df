use std::sync::atomic::AtomicUsize;
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

/// Readers copy a published value into a private one ("TLB") and use it until told otherwise; after
/// each wait the writer spoils the old value. A reader that sees a spoilt value has been missed.
#[test]
fn no_reader_uses_what_a_writer_has_replaced() {
    const ROUNDS: usize = 3000;
    const SPOILT: u64 = u64::MAX;
    let domain = Domain::new();
    let places: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(SPOILT)];
    let published = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for reader in 0..2 {
            let (domain, places, published, stop) = (&domain, &places, &published, &stop);
            scope.spawn(move || {
                let word = Arc::new(Word::default());
                let vcpu = domain.register(word.clone());
                while !stop.load(Ordering::Relaxed) {
                    word.0.store(0, Ordering::SeqCst);
                    vcpu.enter();
                    let mut tlb = published.load(Ordering::Relaxed);
                    for step in 0..50 * (reader + 1) {
                        assert_ne!(places[tlb].load(Ordering::Relaxed), SPOILT);
                        if word.0.load(Ordering::Relaxed) != 0 {
                            word.0.store(0, Ordering::SeqCst);
                            vcpu.checkpoint();
                            tlb = published.load(Ordering::Relaxed);
                        }
                        if step % 16 == 0 {
                            thread::yield_now();
                        }
                    }
                    vcpu.leave();
                }
            });
        }
        for round in 1..=ROUNDS {
            places[round % 2].store(round as u64, Ordering::Relaxed);
            published.store(round % 2, Ordering::Release);
            assert!(
                domain
                    .request_and_wait(Requests::FLUSH_TLB, None)
                    .is_empty()
            );
            places[(round + 1) % 2].store(SPOILT, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
    });
}
