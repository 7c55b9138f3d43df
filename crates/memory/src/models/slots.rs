//! A slot that goes away, and a second level that vCPUs fill from the slots.

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::*;

const NONE: usize = usize::MAX;

/// The slot table, the second level made of it, and the memory of the old slot and the new one.
struct Machine {
    table: AtomicUsize,
    second: AtomicUsize,
    memory: [Place; 2],
}

impl Machine {
    fn new() -> Self {
        Self {
            table: AtomicUsize::new(0),
            second: AtomicUsize::new(NONE),
            memory: [Place::new(), Place::new()],
        }
    }

    /// A vCPU's nested fault: the entry that is there, or one made of the slot.
    fn fill(&self) -> usize {
        let entry = self.second.load(Ordering::Acquire);
        if entry != NONE {
            return entry;
        }
        let slot = self.table.load(Ordering::Acquire);
        self.second.store(slot, Ordering::Release);
        slot
    }

    fn run(&self, vcpu: &Vcpu) {
        let _ = vcpu.enter();
        let mut tlb = self.fill();
        self.memory[tlb].read();
        if !vcpu.poll().is_empty() {
            tlb = self.fill();
        }
        self.memory[tlb].read();
        vcpu.leave();
    }

    fn publish(&self) {
        self.memory[1].write(1);
        self.table.store(1, Ordering::Release);
    }

    fn forget(&self) {
        self.second.store(NONE, Ordering::Release);
    }

    /// The monitor unmaps it.
    fn free_old(&self) {
        self.memory[0].write(2);
    }
}

fn with_writer(preemptions: usize, replace: fn(&Machine, &Domain)) {
    explore(preemptions, move || {
        let domain = Domain::new();
        let machine = Arc::new(Machine::new());
        let vcpu = Vcpu::new(&domain);
        let guest = {
            let (machine, vcpu) = (Arc::clone(&machine), Arc::clone(&vcpu));
            thread::spawn(move || machine.run(&vcpu))
        };
        replace(&machine, &domain);
        machine.free_old();
        guest.join().unwrap();
    });
}

fn wait(domain: &Domain) {
    let nobody = domain.request_and_wait(Requests::FLUSH_TLB, None);
    assert!(nobody.is_empty());
}

/// In the order of `Slots::set_region` and of the MMU's listener: publish, wait until nobody can install
/// from the old table, take its entries away, wait until nobody has them in a TLB.
#[test]
fn nobody_reaches_a_slot_that_is_gone() {
    with_writer(3, |machine, domain| {
        machine.publish();
        wait(domain);
        machine.forget();
        wait(domain);
    });
}

/// A rule broken on purpose: entries go before everybody has seen the new table.
#[test]
#[should_panic(expected = "Causality violation")]
fn entries_taken_away_too_early_are_found() {
    with_writer(3, |machine, domain| {
        machine.publish();
        machine.forget();
        wait(domain);
    });
}
