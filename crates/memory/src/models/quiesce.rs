//! Readers and writers of what is published.

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::*;

/// A table that is replaced, and the place where the next one will be.
struct Published {
    places: [Place; 2],
    current: AtomicUsize,
}

impl Published {
    fn new() -> Self {
        Self {
            places: [Place::new(), Place::new()],
            current: AtomicUsize::new(0),
        }
    }

    fn publish(&self) {
        self.places[1].write(1);
        self.current.store(1, Ordering::Release);
    }

    /// Nobody has the first place any more.
    fn spoil(&self) {
        self.places[0].write(2);
    }

    /// What a TLB without an entry is filled with.
    fn fill(&self, tlb: Option<usize>) -> usize {
        tlb.unwrap_or_else(|| self.current.load(Ordering::Acquire))
    }

    fn use_it(&self, tlb: usize) {
        assert_ne!(self.places[tlb].read(), 2, "used what was replaced");
    }
}

/// Keeps its TLB while it is outside, as vCPUs do.
fn reader(vcpu: &Vcpu, table: &Published, stays: usize, polls: usize) {
    let mut tlb = None;
    for _ in 0..stays {
        if !vcpu.enter().is_empty() {
            tlb = None;
        }
        tlb = Some(table.fill(tlb));
        tlb.iter().for_each(|&t| table.use_it(t));
        for _ in 0..polls {
            if !vcpu.poll().is_empty() {
                tlb = None;
            }
            tlb = Some(table.fill(tlb));
            tlb.iter().for_each(|&t| table.use_it(t));
        }
        vcpu.leave();
    }
}

/// A writer that tells its readers so, and one of them.
fn writer_and(tell: impl FnOnce(&Domain), read: impl FnOnce(&Vcpu, &Published) + Send + 'static) {
    let domain = Domain::new();
    let table = Arc::new(Published::new());
    let vcpu = Vcpu::new(&domain);
    let reads = {
        let (table, vcpu) = (Arc::clone(&table), Arc::clone(&vcpu));
        thread::spawn(move || read(&vcpu, &table))
    };
    table.publish();
    tell(&domain);
    table.spoil();
    reads.join().unwrap();
}

fn one_writer_and(read: impl FnOnce(&Vcpu, &Published) + Send + 'static) {
    let wait = |domain: &Domain| {
        let nobody = domain.request_and_wait(Requests::FLUSH_TLB, None);
        assert!(nobody.is_empty());
    };
    writer_and(wait, read);
}

fn one_writer(stays: usize, polls: usize) {
    one_writer_and(move |vcpu, table| reader(vcpu, table, stays, polls));
}

#[test]
fn a_writer_waits_for_those_who_leave_and_come_back() {
    explore(3, || one_writer(2, 0));
}

#[test]
fn a_writer_waits_for_a_checkpoint() {
    explore(3, || one_writer(1, 2));
}

#[test]
fn two_writers_wait_for_one_reader() {
    explore(2, || {
        let domain = Domain::new();
        let tables = Arc::new([Published::new(), Published::new()]);
        let vcpu = Vcpu::new(&domain);
        let writers: Vec<_> = (0..2)
            .map(|number| {
                let (domain, tables) = (Arc::clone(&domain), Arc::clone(&tables));
                thread::spawn(move || {
                    tables[number].publish();
                    let _ = domain.request_and_wait(Requests::FLUSH_TLB, None);
                    tables[number].spoil();
                })
            })
            .collect();
        let _ = vcpu.enter();
        let mut tlb = [0, 1].map(|n| tables[n].fill(None));
        let see = |tlb: &[usize; 2]| (0..2).for_each(|n| tables[n].use_it(tlb[n]));
        see(&tlb);
        if !vcpu.poll().is_empty() {
            tlb = [0, 1].map(|n| tables[n].fill(None));
        }
        see(&tlb);
        vcpu.leave();
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

/// A vCPU that replaces its own table from inside, and reads the other's.
fn writer_inside(domain: &Domain, vcpu: &Vcpu, tables: &[Published; 2], me: usize) {
    let other = &tables[1 - me];
    let _ = vcpu.enter();
    let mut tlb = other.fill(None);
    other.use_it(tlb);
    tables[me].publish();
    let asked = domain.request_and_wait(Requests::FLUSH_TLB, Some(&vcpu.participant));
    tables[me].spoil();
    if !asked.is_empty() {
        tlb = other.fill(None);
    }
    other.use_it(tlb);
    vcpu.leave();
}

#[test]
fn writers_inside_tell_each_other_and_do_not_block() {
    explore(2, || {
        let domain = Domain::new();
        let tables = Arc::new([Published::new(), Published::new()]);
        let vcpus = [Vcpu::new(&domain), Vcpu::new(&domain)];
        let threads = [0, 1].map(|me| {
            let (domain, tables) = (Arc::clone(&domain), Arc::clone(&tables));
            let vcpu = Arc::clone(&vcpus[me]);
            thread::spawn(move || writer_inside(&domain, &vcpu, &tables, me))
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn who_is_alone_is_alone() {
    explore(2, || {
        let domain = Domain::new();
        let place = Arc::new(Place::new());
        let stopped = Vcpu::new(&domain);
        let stands_still = {
            let (domain, place) = (Arc::clone(&domain), Arc::clone(&place));
            let stopped = Arc::clone(&stopped);
            thread::spawn(move || {
                let asked = stopped.enter();
                let _ = domain.settle(&stopped.participant, asked);
                place.read();
                let asked = stopped.poll();
                let _ = domain.settle(&stopped.participant, asked);
                place.read();
                stopped.leave();
            })
        };
        let vcpu = Vcpu::new(&domain);
        let _ = vcpu.enter();
        let (alone, _) = domain.stop_others(&vcpu.participant);
        place.write(1);
        drop(alone);
        vcpu.leave();
        stands_still.join().unwrap();
    });
}

#[test]
fn only_one_is_alone() {
    explore(2, || {
        let domain = Domain::new();
        let place = Arc::new(Place::new());
        let vcpus = [Vcpu::new(&domain), Vcpu::new(&domain)];
        let threads = [0, 1].map(|me| {
            let (domain, place) = (Arc::clone(&domain), Arc::clone(&place));
            let vcpu = Arc::clone(&vcpus[me]);
            thread::spawn(move || {
                let asked = vcpu.enter();
                let _ = domain.settle(&vcpu.participant, asked);
                let (alone, _) = domain.stop_others(&vcpu.participant);
                place.write(1);
                drop(alone);
                vcpu.leave();
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// A rule broken on purpose: a reader that does not drop its TLB when it is asked to.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_reader_that_ignores_requests_is_found() {
    explore(3, || {
        one_writer_and(|vcpu, table| {
            let _ = vcpu.enter();
            let tlb = table.fill(None);
            let _ = vcpu.poll();
            table.use_it(tlb);
            vcpu.leave();
        });
    });
}

/// A rule broken on purpose: a writer that asks, but does not wait.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_writer_that_does_not_wait_is_found() {
    explore(3, || {
        writer_and(
            |domain| domain.request(Requests::FLUSH_TLB),
            |vcpu, table| reader(vcpu, table, 1, 1),
        );
    });
}
