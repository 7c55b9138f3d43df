//! Memory slots: each answer of `KVM_SET_USER_MEMORY_REGION`.

mod plain;

use addr::{Gfn, Gpa, Hva};
use memory::slot::{Change, MAX_PAGES, Region, SlotFlags, SlotId, Slots, USER_SLOTS};
use plain::{LOG, PAGE, region, slots};

const READONLY: u32 = SlotFlags::READONLY.bits();

fn errno(slots: &Slots, region: Region) -> i32 {
    slots
        .set_region(&region)
        .expect_err("it should be refused")
        .errno()
}

#[test]
fn a_life() {
    let slots = slots();
    let made = slots.set_region(&region()).unwrap();
    assert!(matches!(made, Change::Created { .. }));
    let again = slots.set_region(&region()).unwrap();
    assert!(matches!(again, Change::Unchanged));
    let moved = Region {
        gpa: Gpa::new(0x1_8000),
        ..region()
    };
    assert!(matches!(
        slots.set_region(&moved).unwrap(),
        Change::Moved { .. }
    ));
    let logged = Region {
        flags: LOG,
        ..moved
    };
    assert!(matches!(
        slots.set_region(&logged).unwrap(),
        Change::FlagsChanged { .. }
    ));
    let table = slots.snapshot(0);
    assert!(table.find(Gfn::new(0x17)).is_none());
    let slot = table.find(Gfn::new(0x18)).unwrap();
    assert_eq!(slot.hva_at(Gpa::new(0x1_9234)), Some(Hva::new(0x1000_1234)));
    assert_eq!(slot.hva_at(Gpa::new(0x2_8000)), None);
    // A delete names the slot alone: size zero, whatever else it says (if it is aligned).
    let gone = Region {
        size: 0,
        gpa: Gpa::new(0),
        hva: Hva::new(0),
        ..logged
    };
    assert!(matches!(
        slots.set_region(&gone).unwrap(),
        Change::Deleted { .. }
    ));
    assert_eq!(errno(&slots, gone), libc::EINVAL);
    assert!(slots.snapshot(0).is_empty());
    assert!(!table.is_empty(), "who holds the old table still sees it");
    slots.check_invariants();
}

#[test]
fn bad_regions() {
    let slots = slots();
    let gpa = |raw| Region {
        gpa: Gpa::new(raw),
        ..region()
    };
    let hva = |raw| Region {
        hva: Hva::new(raw),
        ..region()
    };
    let size = |size| Region { size, ..region() };
    let slot = |slot| Region { slot, ..region() };
    let flags = |flags| Region { flags, ..region() };
    let bad = [
        gpa(1),
        gpa(0xfff),
        gpa(u64::MAX),
        gpa(0u64.wrapping_sub(PAGE)),
        gpa((1 << 52) - 15 * PAGE),
        hva(1),
        hva(0x7fff_ffff_f000 - 15 * PAGE),
        hva(0x8000_0000_0000),
        hva(0u64.wrapping_sub(PAGE)),
        size(1),
        size(PAGE - 1),
        size(u64::MAX),
        size((MAX_PAGES + 1) * PAGE),
        size(1 << 63),
        slot(u32::from(USER_SLOTS)),
        slot(0xffff),
        slot(2 << 16),
        slot(u32::MAX),
        flags(4),
        flags(u32::MAX),
    ];
    for region in bad {
        assert_eq!(errno(&slots, region), libc::EINVAL, "{region:x?}");
    }
    assert!(slots.snapshot(0).is_empty(), "an error changes nothing");
    for fine in [
        gpa((1 << 52) - 16 * PAGE),
        Region {
            slot: 2,
            ..hva(0x7fff_ffff_f000 - 16 * PAGE)
        },
        Region {
            slot: u32::from(USER_SLOTS) - 1,
            gpa: Gpa::new(0x10_0000),
            ..region()
        },
        slot(1 << 16),
    ] {
        slots.set_region(&fine).unwrap();
    }
}

#[test]
fn the_largest_slot() {
    let slots = slots();
    let largest = Region {
        size: MAX_PAGES * PAGE,
        flags: LOG,
        ..region()
    };
    slots.set_region(&largest).unwrap();
    let table = slots.snapshot(0);
    let last = Gfn::new(0x10 + MAX_PAGES - 1);
    let slot = table.find(last).unwrap();
    assert!(slot.mark_dirty(last) && !slot.mark_dirty(last));
    assert!(table.find(Gfn::new(last.number() + 1)).is_none());
}

#[test]
fn what_can_not_change() {
    let slots = slots();
    slots.set_region(&region()).unwrap();
    for region in [
        Region {
            size: 8 * PAGE,
            ..region()
        },
        Region {
            hva: Hva::new(0x2000_0000),
            ..region()
        },
        Region {
            flags: READONLY,
            ..region()
        },
    ] {
        assert_eq!(errno(&slots, region), libc::EINVAL, "{region:x?}");
    }
}

#[test]
fn overlaps() {
    let slots = slots();
    slots.set_region(&region()).unwrap();
    for (first, pages) in [(0, 17), (0x1f, 1), (0x10, 1), (0, 256), (0x18, 256)] {
        let gpa = Gpa::new(first * PAGE);
        let region = Region {
            slot: 2,
            gpa,
            size: pages * PAGE,
            ..region()
        };
        assert_eq!(errno(&slots, region), libc::EEXIST, "{region:x?}");
    }
    for (slot, first) in [(2, 0), (3, 0x20), (1 << 16 | 2, 0x10)] {
        let gpa = Gpa::new(first * PAGE);
        slots
            .set_region(&Region {
                slot,
                gpa,
                ..region()
            })
            .unwrap();
    }
    // A move onto another, and a move that overlaps only itself.
    assert_eq!(
        errno(
            &slots,
            Region {
                gpa: Gpa::new(0x1_8000),
                ..region()
            }
        ),
        libc::EEXIST
    );
    slots
        .set_region(&Region {
            slot: 3,
            size: 0,
            ..region()
        })
        .unwrap();
    slots
        .set_region(&Region {
            gpa: Gpa::new(0x1_8000),
            ..region()
        })
        .unwrap();
    // An overlap is told before a guest address that is too high.
    let high = Region {
        slot: 5,
        gpa: Gpa::new((1 << 52) - PAGE),
        size: PAGE,
        ..region()
    };
    slots.set_region(&high).unwrap();
    let higher = Region {
        slot: 6,
        size: 2 * PAGE,
        ..high
    };
    assert_eq!(errno(&slots, higher), libc::EEXIST);
}

#[test]
fn the_same_host_memory_twice() {
    let slots = slots();
    slots.set_region(&region()).unwrap();
    slots
        .set_region(&Region {
            slot: 2,
            gpa: Gpa::new(0),
            ..region()
        })
        .unwrap();
    let table = slots.snapshot(0);
    let hva = |gfn| {
        table
            .find(Gfn::new(gfn))
            .and_then(|s| s.hva_of(Gfn::new(gfn)))
    };
    assert_eq!(hva(0), hva(0x10));
    assert_eq!(
        slots.get(SlotId::new(2)).map(|s| s.base_gfn),
        Some(Gfn::new(0))
    );
}

#[test]
fn all_slots_at_once() {
    let slots = slots();
    let nth = |n: u32| Region {
        slot: n,
        gpa: Gpa::new(u64::from(n) * 2 * PAGE),
        size: PAGE,
        ..region()
    };
    // Neither up nor down: 32,771 is prime to 32,764.
    let order: Vec<u32> = (0..u32::from(USER_SLOTS))
        .map(|n| (u64::from(n) * 32_771 % u64::from(USER_SLOTS)) as u32)
        .collect();
    for n in &order {
        slots.set_region(&nth(*n)).unwrap();
    }
    slots.check_invariants();
    let table = slots.snapshot(0);
    assert_eq!(table.len(), usize::from(USER_SLOTS));
    assert!(table.find(Gfn::new(u64::MAX)).is_none());
    for n in 0..u64::from(USER_SLOTS) {
        assert_eq!(table.find(Gfn::new(2 * n)).unwrap().id.raw(), n as u32);
        assert!(table.find(Gfn::new(2 * n + 1)).is_none());
    }
    for n in order.iter().rev() {
        slots.set_region(&Region { size: 0, ..nth(*n) }).unwrap();
    }
    slots.check_invariants();
    assert!(slots.snapshot(0).is_empty());
}
