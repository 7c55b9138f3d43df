use std::sync::Mutex as StdMutex;

use addr::{Address, Gpa, GpaRange};

use super::*;
use crate::access;
use crate::ram::{GuestRam, RamConfig};
use crate::slot::SlotFlags;

const MIB: u64 = 1 << 20;

/// A device that reads as the low byte of each offset and remembers what was written.
#[derive(Default)]
struct Recorder(StdMutex<Vec<(u64, Vec<u8>)>>);

impl Mmio for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = at as u8;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Machine {
    space: Space,
    ram: GuestRam,
    device: Arc<Recorder>,
    pam: RegionId,
    vga: RegionId,
}

/// RAM below 4 MiB, VGA above it at `a_0000`, a read-only window onto it at `c_0000`, a ROM high up.
fn machine() -> Machine {
    let space = Space::new();
    let ram = GuestRam::new(&RamConfig::new(4 * MIB)).unwrap();
    let bios = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let device = Arc::new(Recorder::default());
    let mut t = space.transaction();
    let root = space.root();
    let low = t
        .region("ram", 4 * MIB, RegionKind::ram(&ram).unwrap())
        .unwrap();
    let vga = t
        .region("vga", 0x2_0000, RegionKind::Mmio(device.clone()))
        .unwrap();
    let window = RegionKind::Alias {
        target: low,
        offset: 0xc_0000,
    };
    let pam = t.region("pam", 0x4_0000, window).unwrap();
    let piece = RamPiece::new(bios, 0).unwrap();
    let rom = RegionKind::Ram {
        piece,
        on_write: Some(device.clone()),
    };
    let rom = t.region("bios", MIB, rom).unwrap();
    t.set_protection(pam, Protection::ReadOnly).unwrap();
    t.set_protection(rom, Protection::ReadOnly).unwrap();
    t.place(root, low, 0, 0).unwrap();
    t.place(root, vga, 0xa_0000, 1).unwrap();
    t.place(root, pam, 0xc_0000, 1).unwrap();
    t.place(root, rom, 0xfff0_0000, 0).unwrap();
    t.commit().unwrap();
    Machine {
        space,
        ram,
        device,
        pam,
        vga,
    }
}

fn lines(space: &Space) -> Vec<String> {
    let view = space.view();
    view.check_invariants();
    view.ranges().iter().map(|r| format!("{r:?}")).collect()
}

#[test]
fn priorities_aliases_and_holes() {
    let machine = machine();
    assert_eq!(
        lines(&machine.space),
        [
            "0x0..0xa0000 ram ram+0x0",
            "0xa0000..0xc0000 mmio vga+0x0",
            "0xc0000..0x100000 rom ram+0xc0000",
            "0x100000..0x400000 ram ram+0x100000",
            "0xfff00000..0x100000000 rom bios+0x0",
        ]
    );
}

#[test]
fn what_is_hidden_shows_what_was_below() {
    let machine = machine();
    let mut t = machine.space.transaction();
    t.set_enabled(machine.vga, Enabled::No).unwrap();
    t.set_protection(machine.pam, Protection::ReadWrite)
        .unwrap();
    let difference = t.commit().unwrap();
    assert_eq!((difference.removed.len(), difference.added.len()), (4, 1));
    assert_eq!(lines(&machine.space)[0], "0x0..0x400000 ram ram+0x0");
}

#[test]
fn an_abandoned_transaction_changes_nothing() {
    let machine = machine();
    let before = lines(&machine.space);
    let mut t = machine.space.transaction();
    t.unplace(machine.vga).unwrap();
    drop(t);
    assert_eq!(lines(&machine.space), before);
}

#[test]
fn later_siblings_of_equal_priority_win() {
    let space = Space::new();
    let device = Arc::new(Recorder::default());
    let mut t = space.transaction();
    for name in ["first", "second"] {
        let region = t
            .region(name, 0x1000, RegionKind::Mmio(device.clone()))
            .unwrap();
        t.place(
            space.root(),
            region,
            if name == "first" { 0 } else { 0x800 },
            0,
        )
        .unwrap();
    }
    t.commit().unwrap();
    let expected = ["0x0..0x800 mmio first+0x0", "0x800..0x1800 mmio second+0x0"];
    assert_eq!(lines(&space), expected);
}

#[test]
fn bad_trees_are_refused() {
    let space = Space::new();
    let root = space.root();
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let mut t = space.transaction();
    let size = |r: Result<RegionId, SpaceError>| matches!(r, Err(SpaceError::Size { .. }));
    assert!(size(t.region("none", 0, RegionKind::Container)));
    assert!(size(t.region(
        "large",
        MIB + 1,
        RegionKind::ram(&ram).unwrap()
    )));
    let a = t.region("a", u64::MAX, RegionKind::Container).unwrap();
    let b = t
        .region(
            "b",
            u64::MAX,
            RegionKind::Alias {
                target: a,
                offset: 0,
            },
        )
        .unwrap();
    assert!(matches!(t.place(a, b, 0, 0), Err(SpaceError::Cycle { .. })));
    assert!(matches!(t.place(a, a, 0, 0), Err(SpaceError::Cycle { .. })));
    assert!(matches!(t.place(a, root, 0, 0), Err(SpaceError::Placed(_))));
    t.place(root, a, u64::MAX, 0).unwrap();
    assert!(matches!(t.place(root, a, 0, 0), Err(SpaceError::Placed(_))));
    assert!(matches!(t.remove(a), Err(SpaceError::InUse(_))));
    assert!(matches!(
        t.set_alias_offset(a, 1),
        Err(SpaceError::NotAnAlias(_))
    ));
    t.remove(b).unwrap();
    assert!(matches!(t.unplace(b), Err(SpaceError::NoSuchRegion(_))));
    t.commit().unwrap();
}

#[test]
fn windows_onto_windows_end() {
    let space = Space::new();
    let device = Arc::new(Recorder::default());
    let mut t = space.transaction();
    let mut inner = t.region("leaf", 1, RegionKind::Mmio(device)).unwrap();
    for level in 0..40 {
        let outer = t
            .region("outer", 2 << level, RegionKind::Container)
            .unwrap();
        for side in 0..2 {
            let window = RegionKind::Alias {
                target: inner,
                offset: 0,
            };
            let window = t.region("window", 1 << level, window).unwrap();
            t.place(outer, window, side << level, 0).unwrap();
        }
        inner = outer;
    }
    t.place(space.root(), inner, 0, 0).unwrap();
    assert!(matches!(t.commit(), Err(SpaceError::TooComplex(_))));
    assert!(lines(&space).is_empty());
}

#[test]
fn transfers_cross_ranges() {
    let machine = machine();
    let at = Gpa::new(0x9_fffe);
    machine.space.write(at, &[1, 2, 3, 4, 5]).unwrap();
    let written = machine.device.0.lock().unwrap().clone();
    assert_eq!(written, [(0, vec![3, 4]), (2, vec![5])]);
    let mut bytes = [0; 5];
    machine.space.read(at, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 0, 1, 2]);
    let hole = machine.space.read(Gpa::new(4 * MIB - 1), &mut bytes);
    assert_eq!(hole, Err(TransferError::Hole(Gpa::new(4 * MIB))));
    let wraps = machine.space.write(Gpa::new(u64::MAX), &bytes);
    assert!(matches!(wraps, Err(TransferError::Wraps { .. })));
}

#[test]
fn ram_is_mapped_in_place_and_marked() {
    let machine = machine();
    let mapped = machine
        .space
        .map(Gpa::new(0x1_0ffe), 4, Access::Write)
        .unwrap();
    assert_eq!(
        mapped.hva(),
        Some(machine.ram.hva().checked_add(0x1_0ffe).unwrap())
    );
    let mut mapped = mapped;
    assert_eq!(mapped.write(0, &[1, 2, 3, 4]), Ok(4));
    assert_eq!(
        mapped.write(3, &[9, 9]),
        Ok(1),
        "no further than it reaches"
    );
    assert_eq!(mapped.write(4, &[9]), Ok(0));
    mapped.unmap(4).unwrap();
    assert_eq!(
        access::load(machine.ram.hva().checked_add(0x1_0ffe).unwrap(), 4),
        Ok(0x0903_0201)
    );
    let view = machine.space.view();
    let Memory::Ram { piece, .. } = &view.find(Gpa::new(0)).unwrap().memory else {
        panic!("RAM is no RAM");
    };
    let pages: Vec<u64> = (0..1024).filter(|p| piece.dirty.is_marked(*p)).collect();
    assert_eq!(pages, [0x10, 0x11]);
}

#[test]
fn a_mapping_stops_at_the_ranges_end() {
    let machine = machine();
    let mapped = machine
        .space
        .map(Gpa::new(0x9_f000), MIB, Access::Read)
        .unwrap();
    assert_eq!(mapped.len(), 0x1000);
    let mut bytes = [7; 2];
    assert_eq!(mapped.read(0xfff, &mut bytes), Ok(1));
    assert_eq!(bytes, [0, 7]);
    assert_eq!(mapped.read(u64::MAX, &mut bytes), Ok(0));
    let hole = machine
        .space
        .map(Gpa::new(4 * MIB), 1, Access::Read)
        .unwrap_err();
    assert_eq!(hole, TransferError::Hole(Gpa::new(4 * MIB)).into());
    let empty = machine.space.map(Gpa::new(0), 0, Access::Read).unwrap_err();
    assert_eq!(empty, MapError::Empty(Gpa::new(0)));
}

#[test]
fn devices_are_bounced() {
    let machine = machine();
    let mapped = machine
        .space
        .map(Gpa::new(0xa_0010), MIB, Access::Read)
        .unwrap();
    assert_eq!((mapped.len(), mapped.hva()), (4096, None));
    let mut bytes = [0; 3];
    assert_eq!(mapped.read(1, &mut bytes), Ok(3));
    assert_eq!(bytes, [0x11, 0x12, 0x13]);
    mapped.unmap(3).unwrap();
    assert!(
        machine.device.0.lock().unwrap().is_empty(),
        "mapped to be read"
    );
    let mut mapped = machine
        .space
        .map(Gpa::new(0xa_0006), 16, Access::Write)
        .unwrap();
    mapped.write(0, &[1; 16]).unwrap();
    mapped.unmap(4).unwrap();
    let written = machine.device.0.lock().unwrap().clone();
    assert_eq!(written, [(6, vec![1, 1]), (8, vec![1, 1])]);
}

#[test]
fn rom_is_read_in_place_and_written_elsewhere() {
    let machine = machine();
    let at = Gpa::new(0xfff0_0000);
    assert!(
        machine
            .space
            .map(at, 1, Access::Read)
            .unwrap()
            .hva()
            .is_some()
    );
    let mut mapped = machine.space.map(at, 1, Access::Write).unwrap();
    mapped.write(0, &[5]).unwrap();
    mapped.unmap(1).unwrap();
    assert_eq!(*machine.device.0.lock().unwrap(), [(0, vec![5])]);
    let mut byte = [9];
    machine.space.read(at, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    machine.space.write(Gpa::new(0xc_0000), &[1]).unwrap();
    machine.space.read(Gpa::new(0xc_0000), &mut byte).unwrap();
    assert_eq!(byte, [0], "the window is read-only and has no device");
}

#[test]
fn bounce_buffers_run_out_and_come_back() {
    let Machine { space, .. } = machine();
    let space = space.with_bounce_limit(8192);
    let map = || space.map(Gpa::new(0xa_0000), 4096, Access::Write);
    let first = map().unwrap();
    let _second = map().unwrap();
    assert_eq!(
        map().unwrap_err(),
        MapError::NoBounceBuffer(Gpa::new(0xa_0000))
    );
    drop(first);
    assert!(map().is_ok());
}

#[test]
fn slots_follow_the_view() {
    let machine = machine();
    let mut slots = SlotAssigner::new(4);
    let all = Difference {
        removed: Vec::new(),
        added: machine.space.view().ranges().to_vec(),
    };
    let calls = slots.follow(&all).unwrap();
    let summary: Vec<_> = calls
        .iter()
        .map(|c| (c.slot, c.gpa.raw(), c.size, c.flags))
        .collect();
    let (plain, readonly) = (SlotFlags::empty(), SlotFlags::READONLY);
    assert_eq!(
        summary,
        [
            (0, 0, 0xa_0000, plain),
            (1, 0xc_0000, 0x4_0000, readonly),
            (2, 0x10_0000, 0x30_0000, plain),
            (3, 0xfff0_0000, MIB, readonly),
        ]
    );
    let mut t = machine.space.transaction();
    t.unplace(machine.pam).unwrap();
    let calls = slots.follow(&t.commit().unwrap()).unwrap();
    let summary: Vec<_> = calls
        .iter()
        .map(|c| (c.slot, c.gpa.raw(), c.size))
        .collect();
    assert_eq!(
        summary,
        [
            (1, 0xc_0000, 0),
            (2, 0x10_0000, 0),
            (1, 0xc_0000, 0x34_0000)
        ]
    );
    assert_eq!(SlotAssigner::new(2).follow(&all), Err(SlotsExhausted(2)));
}

#[test]
fn slots_hold_whole_pages_only() {
    let space = Space::new();
    let ram = GuestRam::new(&RamConfig::new(MIB)).unwrap();
    let device = Arc::new(Recorder::default());
    let mut t = space.transaction();
    let ram = t
        .region("ram", MIB, RegionKind::ram(&ram).unwrap())
        .unwrap();
    t.place(space.root(), ram, 0, 0).unwrap();
    let registers = t
        .region("registers", 0x10, RegionKind::Mmio(device))
        .unwrap();
    t.place(space.root(), registers, 0x8008, 1).unwrap();
    let calls = SlotAssigner::new(8).follow(&t.commit().unwrap()).unwrap();
    let summary: Vec<_> = calls.iter().map(|c| (c.gpa.raw(), c.size)).collect();
    assert_eq!(summary, [(0, 0x8000), (0x9000, MIB - 0x9000)]);
}

#[test]
fn a_listener_is_told() {
    struct Tell(Arc<StdMutex<Vec<(usize, usize)>>>);
    impl Listener for Tell {
        fn changed(&mut self, difference: &Difference) -> Result<(), ListenerError> {
            let numbers = (difference.removed.len(), difference.added.len());
            self.0.lock().unwrap().push(numbers);
            if numbers.0 > 0 {
                Err("enough".into())
            } else {
                Ok(())
            }
        }
    }
    let machine = machine();
    let told = Arc::default();
    machine
        .space
        .listen(Box::new(Tell(Arc::clone(&told))))
        .unwrap();
    let mut t = machine.space.transaction();
    t.set_enabled(machine.vga, Enabled::Yes).unwrap();
    t.commit().unwrap();
    assert_eq!(
        *told.lock().unwrap(),
        [(0, 5)],
        "nothing changed, nobody is told"
    );
    let mut t = machine.space.transaction();
    t.set_enabled(machine.vga, Enabled::No).unwrap();
    assert!(matches!(t.commit(), Err(SpaceError::Listener(_))));
    assert_eq!(told.lock().unwrap().len(), 2);
    assert_eq!(
        machine.space.view().ranges()[0].range,
        GpaRange::new(Gpa::new(0), 0xc_0000).unwrap()
    );
}
