//! Noticing what the guest touches: working set, dirty rings, the manual dirty log.

mod machine;

use std::sync::Arc;

use addr::{Gfn, Gpa, Gva};
use machine::{Machine, PATHS, READ, WRITE};
use memory::slot::{ClearLog, ManualProtect, SlotFlags};
use mmu::PagingPath;

const MIB: u64 = 1 << 20;

#[test]
fn the_working_set_is_what_was_touched() {
    for path in PATHS {
        let mut machine = Machine::new(path, 8 * MIB);
        let mut touch = |pages: &[u64]| {
            for page in pages {
                machine.vcpu.translate(Gva::new(page << 12), READ).unwrap();
            }
        };
        let accessed = |mmu: &mmu::Mmu| -> Vec<u64> {
            let words = mmu.take_accessed();
            let bits = |w: memory::dirty::DirtyWord| (0..64).filter(move |n| w.mask >> n & 1 == 1);
            let page = |w: memory::dirty::DirtyWord, n| w.index as u64 * 64 + n;
            words
                .into_iter()
                .flat_map(|w| bits(w).map(move |n| page(w, n)))
                .collect()
        };
        let mmu = Arc::clone(&machine.mmu);
        touch(&[300]);
        mmu.track_accesses(0, Gfn::new(256)..Gfn::new(512)).unwrap();
        touch(&[256, 400, 511, 10, 600]);
        assert_eq!(accessed(&mmu), [0, 144, 255]);
        touch(&[257]);
        assert_eq!(accessed(&mmu), [1], "{path:?}");
        mmu.stop_tracking_accesses();
        touch(&[258]);
        assert_eq!(accessed(&mmu), [0_u64; 0]);
    }
}

/// A ring of one page in memory of the test's own.
#[test]
fn a_dirty_ring_hears_of_each_write_once() {
    let mut machine = Machine::without_slots(PagingPath::Nested, 8 * MIB);
    machine.slots.enable_dirty_ring(4096).unwrap();
    let log = SlotFlags::LOG_DIRTY_PAGES;
    machine.slot(3, Gpa::new(0), 0, 4 * MIB, log).unwrap();
    let ring = machine.host(6 * MIB);
    machine.vcpu.set_dirty_ring(ring, 4096).unwrap();
    let entry = |machine: &Machine, n: u64| {
        let at = 6 * MIB + n * 16;
        (machine.peek(at), machine.peek(at + 8))
    };
    let slot_and_dirty = |flags: u64| 3 << 32 | flags;
    for page in [7, 7, 9] {
        machine.vcpu.translate(Gva::new(page << 12), READ).unwrap();
        machine.vcpu.translate(Gva::new(page << 12), WRITE).unwrap();
    }
    assert_eq!(entry(&machine, 0), (slot_and_dirty(1), 7));
    assert_eq!(entry(&machine, 1), (slot_and_dirty(1), 9));
    assert_eq!(entry(&machine, 2), (0, 0));
    assert_eq!(
        machine.mmu.reset_dirty_rings(),
        Ok(0),
        "nothing is collected yet"
    );
    // The monitor collects the first, and lies about the second's page.
    machine.poke(6 * MIB, slot_and_dirty(3));
    machine.poke(6 * MIB + 16, slot_and_dirty(3));
    machine.poke(6 * MIB + 24, u64::MAX);
    assert_eq!(machine.mmu.reset_dirty_rings(), Ok(2));
    let got = machine.vcpu.translate(Gva::new(7 << 12), READ).unwrap();
    assert!(!got.writable, "the next write will be noticed");
    machine.vcpu.translate(Gva::new(7 << 12), WRITE).unwrap();
    assert_eq!(entry(&machine, 2), (slot_and_dirty(1), 7));
    machine.mmu.check_invariants().unwrap();
}

#[test]
fn a_full_ring_asks_the_vcpu_to_leave() {
    let mut machine = Machine::without_slots(PagingPath::Nested, 8 * MIB);
    machine.slots.enable_dirty_ring(4096).unwrap();
    let log = SlotFlags::LOG_DIRTY_PAGES;
    machine.slot(0, Gpa::new(0), 0, 4 * MIB, log).unwrap();
    machine
        .vcpu
        .set_dirty_ring(machine.host(6 * MIB), 4096)
        .unwrap();
    for page in 0..300_u64 {
        assert_eq!(
            machine.vcpu.dirty_ring_full(),
            page >= 192,
            "after {page} pages"
        );
        machine.vcpu.translate(Gva::new(page << 12), WRITE).unwrap();
    }
}

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with all pages dirty at first: no write is noticed before the
/// first clear.
#[test]
fn an_initially_set_log_protects_at_the_first_clear() {
    for path in PATHS {
        let mut machine = Machine::new(path, 8 * MIB);
        machine
            .slots
            .set_manual_protect(ManualProtect::InitiallySet);
        let writable = |machine: &mut Machine, page: u64, access| {
            machine
                .vcpu
                .translate(Gva::new(page << 12), access)
                .unwrap()
                .writable
        };
        assert!(writable(&mut machine, 5, WRITE));
        let log = SlotFlags::LOG_DIRTY_PAGES;
        machine.slot(0, Gpa::new(0), 0, 8 * MIB, log).unwrap();
        assert!(writable(&mut machine, 5, READ), "{path:?}: still marked");
        assert_eq!(machine.slots.harvest(0).unwrap(), [u64::MAX; 32]);
        // The bitmap that the monitor hands over: pages 0 to 63.
        machine.poke(7 * MIB, u64::MAX);
        let clear = ClearLog {
            slot: 0,
            first_page: 0,
            num_pages: 64,
            bitmap: machine.host(7 * MIB),
        };
        machine.slots.clear_dirty_log(&clear).unwrap();
        assert!(!writable(&mut machine, 5, READ), "{path:?}: cleared");
        assert!(writable(&mut machine, 5, WRITE));
        let words = machine.slots.harvest(0).unwrap();
        assert_eq!((words[0], words[1]), (1 << 5, u64::MAX));
    }
}
