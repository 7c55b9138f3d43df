//! The dirty log: each answer of `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.

mod plain;

use addr::{Gfn, Gpa, Hva};
use memory::slot::{ClearLog, DirtyLogError, ManualProtect, Region, USER_SLOTS};
use plain::{LOG, PAGE, region, slots};

/// Where the bitmap of a call lies.
fn buffer(words: &[u64]) -> Hva {
    Hva::new(words.as_ptr() as u64)
}

#[test]
fn a_dirty_log_is_read_once() {
    let slots = slots();
    slots
        .set_region(&Region {
            flags: LOG,
            size: 65 * PAGE,
            ..region()
        })
        .unwrap();
    for gfn in [0x10, 0x10 + 63, 0x10 + 64] {
        slots
            .snapshot(0)
            .find(Gfn::new(gfn))
            .unwrap()
            .mark_dirty(Gfn::new(gfn));
    }
    let words = [0; 3];
    slots.get_dirty_log(1, buffer(&words)).unwrap();
    assert_eq!(std::hint::black_box(words), [1 | 1 << 63, 1, 0]);
    assert_eq!(slots.harvest(1).unwrap(), [0, 0]);
}

#[test]
fn a_log_survives_a_move_but_not_its_flag() {
    let slots = slots();
    let logged = Region {
        flags: LOG,
        ..region()
    };
    slots.set_region(&logged).unwrap();
    slots
        .snapshot(0)
        .find(Gfn::new(0x11))
        .unwrap()
        .mark_dirty(Gfn::new(0x11));
    let moved = Region {
        gpa: Gpa::new(0),
        ..logged
    };
    slots.set_region(&moved).unwrap();
    assert_eq!(slots.harvest(1).unwrap(), [2]);
    slots
        .snapshot(0)
        .find(Gfn::new(1))
        .unwrap()
        .mark_dirty(Gfn::new(1));
    slots.set_region(&Region { flags: 0, ..moved }).unwrap();
    assert_eq!(slots.harvest(1).unwrap_err().errno(), libc::ENOENT);
    slots.set_region(&moved).unwrap();
    assert_eq!(slots.harvest(1).unwrap(), [0]);
}

#[test]
fn bad_calls_on_the_log() {
    let slots = slots();
    let words = [u64::MAX; 2];
    let clear = ClearLog {
        slot: 1,
        first_page: 0,
        num_pages: 65,
        bitmap: buffer(&words),
    };
    let errno = |clear: ClearLog| slots.clear_dirty_log(&clear).map_err(DirtyLogError::errno);
    assert_eq!(errno(clear), Err(libc::ENOENT), "no slot");
    slots
        .set_region(&Region {
            size: 65 * PAGE,
            ..region()
        })
        .unwrap();
    assert_eq!(errno(clear), Err(libc::ENOENT), "no log");
    assert_eq!(slots.harvest(1).unwrap_err().errno(), libc::ENOENT);
    for slot in [u32::from(USER_SLOTS), 2 << 16, u32::MAX] {
        assert_eq!(errno(ClearLog { slot, ..clear }), Err(libc::EINVAL));
        assert_eq!(slots.harvest(slot).unwrap_err().errno(), libc::EINVAL);
    }
    slots
        .set_region(&Region {
            size: 65 * PAGE,
            flags: LOG,
            ..region()
        })
        .unwrap();
    for (first_page, num_pages) in [(1, 64), (63, 2), (128, 0), (64, 2), (0, 66), (0, 63)] {
        let bad = ClearLog {
            first_page,
            num_pages,
            ..clear
        };
        assert_eq!(errno(bad), Err(libc::EINVAL), "{bad:?}");
    }
    for (first_page, num_pages) in [(u64::MAX - 63, 64), (0, u32::MAX), (64, u32::MAX)] {
        let bad = ClearLog {
            first_page,
            num_pages,
            ..clear
        };
        assert_eq!(errno(bad), Err(libc::EINVAL), "{bad:?}");
    }
    for (first_page, num_pages) in [(0, 65), (0, 64), (64, 1), (0, 0), (64, 0)] {
        assert_eq!(
            errno(ClearLog {
                first_page,
                num_pages,
                ..clear
            }),
            Ok(())
        );
    }
    let nowhere = Hva::new(0x10);
    assert_eq!(
        errno(ClearLog {
            bitmap: nowhere,
            ..clear
        }),
        Err(libc::EFAULT)
    );
    assert_eq!(
        slots.get_dirty_log(1, nowhere).unwrap_err().errno(),
        libc::EFAULT
    );
}

#[test]
fn the_two_steps_of_manual_protection() {
    let slots = slots();
    slots.set_manual_protect(ManualProtect::InitiallySet);
    slots
        .set_region(&Region {
            flags: LOG,
            size: 70 * PAGE,
            ..region()
        })
        .unwrap();
    assert_eq!(
        slots.harvest(1).unwrap(),
        [u64::MAX, 0x3f],
        "a new log says all"
    );
    assert_eq!(
        slots.harvest(1).unwrap(),
        [u64::MAX, 0x3f],
        "reading leaves it"
    );
    let words = [0xff, u64::MAX];
    let clear = ClearLog {
        slot: 1,
        first_page: 0,
        num_pages: 70,
        bitmap: buffer(&words),
    };
    slots.clear_dirty_log(&clear).unwrap();
    assert_eq!(slots.harvest(1).unwrap(), [!0xff, 0]);
    assert_eq!(ManualProtect::from_argument(2), None);
    assert_eq!(
        ManualProtect::from_argument(3),
        Some(ManualProtect::InitiallySet)
    );
}

#[test]
fn rings_instead_of_bitmaps() {
    let slots = slots();
    assert_eq!(
        slots.enable_dirty_ring(100).unwrap_err().errno(),
        libc::EINVAL
    );
    assert_eq!(
        slots.enable_dirty_ring(1 << 40).unwrap_err().errno(),
        libc::E2BIG
    );
    slots.enable_dirty_ring(1 << 16).unwrap();
    assert_eq!(
        slots.enable_dirty_ring(1 << 16).unwrap_err().errno(),
        libc::EINVAL
    );
    slots
        .set_region(&Region {
            flags: LOG,
            ..region()
        })
        .unwrap();
    let table = slots.snapshot(0);
    let slot = table.find(Gfn::new(0x10)).unwrap();
    assert!(slot.logs_dirty() && slot.dirty.is_none());
    assert_eq!(slots.harvest(1).unwrap_err().errno(), libc::ENXIO);
    let clear = ClearLog {
        slot: 1,
        first_page: 0,
        num_pages: 16,
        bitmap: Hva::new(0),
    };
    assert_eq!(
        slots.clear_dirty_log(&clear).unwrap_err().errno(),
        libc::ENXIO
    );
}
