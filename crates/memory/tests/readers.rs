//! Who depends on slots: listeners, and readers that run while slots change.

mod plain;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use addr::{Address, Gfn};
use memory::access;
use memory::dirty::DirtyWord;
use memory::quiesce::{Kick, Requests};
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Change, Listener, OutOfMemory, Region, Slot, Slots};
use plain::{LOG, PAGE, region, slots};

/// What no slot's memory holds.
const SPOILT: u64 = u64::MAX;

/// Writes down what it is told, with the number of slots that readers see at that time.
struct Diary {
    slots: Weak<Slots>,
    refuse: AtomicBool,
    lines: Mutex<Vec<String>>,
}

impl Diary {
    fn write(&self, what: &str, slot: Option<&Slot>) {
        let seen = self.slots.upgrade().unwrap().snapshot(0).len();
        let id = slot.map(|s| s.id);
        self.lines
            .lock()
            .unwrap()
            .push(format!("{what} {id:?}, {seen} in the table"));
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.lines.lock().unwrap())
    }
}

impl Listener for Diary {
    fn prepare(&self, change: &Change) -> Result<(), OutOfMemory> {
        self.write("prepare", change.new_slot().or(change.old()));
        if self.refuse.load(Ordering::Relaxed) {
            Err(OutOfMemory)
        } else {
            Ok(())
        }
    }

    fn published(&self, change: &Change) {
        self.write("published", change.new_slot().or(change.old()));
    }

    fn settled(&self, change: &Change) {
        self.write("settled", change.new_slot().or(change.old()));
    }

    fn write_protect(&self, slot: &Slot, words: &[DirtyWord]) {
        self.write(&format!("protect {words:?}"), Some(slot));
    }
}

#[test]
fn listeners_are_told_in_order() {
    let slots = slots();
    let diary = Arc::new(Diary {
        slots: Arc::downgrade(&slots),
        refuse: AtomicBool::new(true),
        lines: Mutex::default(),
    });
    let listener: Weak<dyn Listener> = Arc::downgrade(&(diary.clone() as Arc<dyn Listener>));
    slots.listen(listener);
    assert_eq!(
        slots.set_region(&region()).unwrap_err().errno(),
        libc::ENOMEM
    );
    assert_eq!(diary.take(), ["prepare Some(slot 0:1), 0 in the table"]);
    assert!(slots.snapshot(0).is_empty());
    slots.check_invariants();
    diary.refuse.store(false, Ordering::Relaxed);
    slots
        .set_region(&Region {
            flags: LOG,
            ..region()
        })
        .unwrap();
    assert_eq!(
        diary.take(),
        [
            "prepare Some(slot 0:1), 0 in the table",
            "published Some(slot 0:1), 1 in the table",
            "settled Some(slot 0:1), 1 in the table",
        ]
    );
    slots.harvest(1).unwrap();
    assert!(diary.take().is_empty(), "a clean log protects nothing");
    slots
        .snapshot(0)
        .find(Gfn::new(0x12))
        .unwrap()
        .mark_dirty(Gfn::new(0x12));
    slots.harvest(1).unwrap();
    let line = "protect [DirtyWord { index: 0, mask: 4 }] Some(slot 0:1), 1 in the table";
    assert_eq!(diary.take(), [line]);
    drop(diary);
    slots
        .set_region(&Region {
            size: 0,
            ..region()
        })
        .unwrap();
}

/// The word that a vCPU polls.
#[derive(Default)]
struct Word(AtomicU32);

impl Kick for Word {
    fn kick(&self, requests: Requests) {
        self.0.fetch_or(requests.bits(), Ordering::SeqCst);
    }
}

/// Two readers use what they find until they are told to drop it; a writer deletes and creates the
/// slot on one of two pieces of memory, and spoils a piece when it is in no slot.
#[test]
fn nobody_reaches_memory_that_no_slot_names() {
    let slots = slots();
    let ram = GuestRam::new(&RamConfig::new(2 * PAGE)).unwrap();
    let piece = |n: u64| Region {
        hva: ram.hva().wrapping_add(n % 2 * PAGE),
        size: PAGE,
        ..region()
    };
    slots.set_region(&piece(0)).unwrap();
    let stop = AtomicBool::new(false);
    let reads = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| read_until(&slots, &stop, &reads));
        }
        for round in 0..2000 {
            let gone = Region {
                size: 0,
                ..piece(round)
            };
            slots.set_region(&gone).unwrap();
            access::store_word(piece(round).hva, SPOILT).unwrap();
            access::store_word(piece(round + 1).hva, round).unwrap();
            slots.set_region(&piece(round + 1)).unwrap();
            if round % 100 == 0 {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 0, "the readers saw nothing");
}

fn read_until(slots: &Arc<Slots>, stop: &AtomicBool, reads: &AtomicU32) {
    let word = Arc::new(Word::default());
    let vcpu = slots.domain().register(word.clone());
    let mut reader = slots.reader(0);
    while !stop.load(Ordering::Relaxed) {
        word.0.store(0, Ordering::SeqCst);
        vcpu.enter();
        let mut tlb = reader.find(Gfn::new(0x10)).map(|s| s.hva);
        for _ in 0..100 {
            if word.0.swap(0, Ordering::SeqCst) != 0 {
                vcpu.checkpoint();
                tlb = reader.find(Gfn::new(0x10)).map(|s| s.hva);
            }
            if let Some(hva) = tlb {
                assert_ne!(access::load_word(hva), Ok(SPOILT));
                reads.fetch_add(1, Ordering::Relaxed);
            }
        }
        vcpu.leave();
    }
}
