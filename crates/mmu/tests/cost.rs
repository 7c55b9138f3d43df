//! What the tables cost in memory: the promises of the README, kept.

mod machine;

use addr::{Gpa, Gva};
use machine::{Machine, PATHS, READ, long_mode};
use memory::slot::SlotFlags;
use mmu::PagingPath;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;
const RW: u64 = 3;
const RW_LARGE: u64 = 0x83;

/// Bytes of the path's tables when all of 1 GiB is mapped by entries of so many bytes.
fn cost(path: PagingPath, entry: u64) -> usize {
    // RAM that nobody touches costs nothing.
    let mut machine = Machine::without_slots(path, GIB);
    let flags = if entry == PAGE {
        SlotFlags::LOG_DIRTY_PAGES
    } else {
        SlotFlags::empty()
    };
    // The last page is in a slot of its own, so that no page of 1 GiB fits.
    machine
        .slot(0, Gpa::new(0), 0, GIB - 2 * MIB, flags)
        .unwrap();
    machine
        .slot(1, Gpa::new(GIB - 2 * MIB), GIB - 2 * MIB, 2 * MIB, flags)
        .unwrap();
    machine.poke(0x1000, 0x2000 | RW);
    machine.poke(0x2000, 0x3000 | RW);
    for large in 0..512 {
        let table = 0x10_0000 + large * PAGE;
        if entry == PAGE {
            machine.poke(0x3000 + large * 8, table | RW);
            (0..512).for_each(|n| machine.poke(table + n * 8, ((large * 512 + n) * PAGE) | RW));
        } else {
            machine.poke(0x3000 + large * 8, (large * 2 * MIB) | RW_LARGE);
        }
    }
    let _ = machine.vcpu.set_registers(&long_mode(0x1000));
    for gva in (0..GIB).step_by(entry as usize) {
        machine.vcpu.translate(Gva::new(gva), READ).unwrap();
    }
    machine.mmu.check_invariants().unwrap();
    // The vCPU's spare tables are not part of the mapping.
    drop(machine.vcpu);
    machine.mmu.table_bytes()
}

#[test]
fn tables_cost_what_the_readme_says() {
    let kib = |path, entry| cost(path, entry) / 1024;
    let costs = PATHS.map(|path| (kib(path, PAGE), kib(path, 2 * MIB)));
    let [nested, shadow, direct] = costs;
    assert_eq!(
        nested,
        (2052, 4),
        "512 tables and the one above them; that one alone"
    );
    assert_eq!(
        shadow,
        (4120, 24),
        "twice as much a table: the guest's entries are kept"
    );
    assert_eq!(direct, (0, 0), "nothing but the TLB");
}
