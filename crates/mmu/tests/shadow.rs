//! Shadow tables: large pages around protected tables, and beginning anew.

mod machine;

use addr::{Gva, PageSize};
use machine::{Machine, READ, WRITE, long_mode, one_page};
use mmu::{MmuConfig, PagingPath, TlbEffect};

const MIB: u64 = 1 << 20;
const P_RW_US: u64 = 7;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;

/// Shadow tables: a guest's large page is one leaf until one of its frames must be protected.
#[test]
fn a_shadowed_large_page_is_split_around_a_table() {
    let mut machine = Machine::new(PagingPath::Shadow, 8 * MIB);
    machine.join();
    machine.poke(0x1000, 0x2000 | P_RW_US);
    machine.poke(0x2000, 0x3000 | P_RW_US);
    for page in 0..4 {
        machine.poke(0x3000 + page * 8, (page * 2 * MIB) | P_RW_US | PS | A | D);
    }
    let _ = machine.vcpu.set_registers(&long_mode(0x1000));
    let size_at = |machine: &mut Machine, gva, access| {
        let got = machine.vcpu.translate(Gva::new(gva), access).unwrap();
        (got.size, got.writable)
    };
    assert_eq!(size_at(&mut machine, 0, READ), (PageSize::Size2M, true));
    assert_eq!(
        size_at(&mut machine, 2 * MIB, READ),
        (PageSize::Size2M, true)
    );
    // The guest flushes, and its tables (in the first 2 MiB) stay as they are.
    let effects: Vec<_> = (0..4).map(|_| machine.vcpu.invalidate_all()).collect();
    assert!(
        effects.contains(&TlbEffect::FlushAll),
        "tables became protected"
    );
    assert_eq!(
        size_at(&mut machine, 0x5000, READ),
        (PageSize::Size4K, true)
    );
    assert_eq!(
        size_at(&mut machine, 0x1000, READ),
        (PageSize::Size4K, false)
    );
    assert_eq!(
        size_at(&mut machine, 2 * MIB, READ),
        (PageSize::Size2M, true)
    );
    assert_eq!(machine.mmu.shadow_stats().mmu_unsync, 0);
    // A store to a table is let through, and unsynchronises it.
    assert_eq!(
        size_at(&mut machine, 0x1000, WRITE),
        (PageSize::Size4K, true)
    );
    assert_eq!(machine.mmu.shadow_stats().mmu_unsync, 1);
    machine.mmu.check_invariants().unwrap();
}

/// More shadow pages than allowed: all go at the next flush, and come back as needed.
#[test]
fn too_many_shadow_pages_are_recycled() {
    let config = MmuConfig {
        path: PagingPath::Shadow,
        shadow_pages: 3,
        ..MmuConfig::default()
    };
    let mut machine = Machine::with_config(config, 8 * MIB);
    machine.join();
    one_page(&mut machine);
    let gva = Gva::new(0x40_0000);
    let got = machine.vcpu.translate(gva, READ).unwrap();
    assert!(machine.mmu.table_bytes() > 0);
    assert_eq!(machine.vcpu.invalidate_all(), TlbEffect::FlushAll);
    assert_eq!(machine.mmu.table_bytes(), 0);
    assert_eq!(machine.mmu.stats().mmu_recycled.get(), 4);
    assert_eq!(machine.vcpu.translate(gva, READ), Ok(got));
    machine.mmu.check_invariants().unwrap();
}

/// A guest that takes table after table into use and never flushes.
#[test]
fn shadow_pages_are_bounded_without_flushes() {
    const LIMIT: usize = 64;
    const BYTES_OF_A_PAGE: usize = 2 * 4096;
    let mut machine = Machine::new(PagingPath::Shadow, 8 * MIB);
    let participant = machine.join();
    one_page(&mut machine);
    machine.mmu.set_shadow_limit(LIMIT);
    for table in 0..512 {
        let at = 2 * MIB + table * 0x1000;
        machine.poke(0x3000 + table * 8, at | P_RW_US);
        machine.poke(at, (4 * MIB + table * 0x1000) | P_RW_US);
        let gva = Gva::new(table * 2 * MIB);
        let got = machine.vcpu.translate(gva, READ).unwrap();
        assert_eq!(got.gpa.raw(), 4 * MIB + table * 0x1000);
        // Whoever translates may hold another translation: it is told, and nothing goes yet.
        let had = machine.mmu.table_bytes();
        if participant.has_requests() {
            assert!(had > LIMIT * BYTES_OF_A_PAGE);
            let _ = participant.enter();
            assert_eq!(machine.vcpu.keep_limits(), TlbEffect::FlushAll);
            participant.leave();
            assert_eq!(machine.mmu.table_bytes(), 0);
        }
        assert!(machine.mmu.table_bytes() <= (LIMIT + 4) * BYTES_OF_A_PAGE);
    }
    assert!(machine.mmu.stats().mmu_recycled.get() >= 512 - LIMIT as u64);
    machine.mmu.check_invariants().unwrap();
}

/// A page-table page is emptied, freed, and taken for another address, as the kernel does when a
/// process replaces itself by another: nothing is invalidated, because nothing at the new address
/// was ever mapped.
#[test]
fn a_table_in_its_second_life_holds_nothing_of_its_first() {
    const OLD: u64 = 0x40_0000;
    const NEW: u64 = 0x8000_0000;
    let mut machine = Machine::new(PagingPath::Shadow, 8 * MIB);
    machine.join();
    one_page(&mut machine);
    machine.poke(0x4008, 0x20_1000 | P_RW_US);
    let at = |machine: &mut Machine, gva| {
        let got = machine.vcpu.translate(Gva::new(gva), READ);
        got.map(|got| got.gpa.raw())
    };
    assert_eq!(at(&mut machine, OLD), Ok(0x20_0000));
    assert_eq!(at(&mut machine, OLD + 0x1000), Ok(0x20_1000));
    // The last table goes.
    machine.poke(0x3000 + 2 * 8, 0);
    machine.poke(0x4000, 0);
    machine.poke(0x4008, 0);
    // It comes back below a directory of its own, with another page in it.
    machine.poke(0x4000, 0x30_0000 | P_RW_US);
    machine.poke(0x5000, 0x4000 | P_RW_US);
    machine.poke(0x2000 + 2 * 8, 0x5000 | P_RW_US);
    assert_eq!(at(&mut machine, NEW), Ok(0x30_0000));
    assert!(at(&mut machine, NEW + 0x1000).is_err(), "nothing is there");
    machine.poke(0x4008, 0x30_1000 | P_RW_US);
    assert_eq!(at(&mut machine, NEW + 0x1000), Ok(0x30_1000));
    machine.mmu.check_invariants().unwrap();
}

/// The same for a table that leads to such a table.
#[test]
fn a_directory_that_is_linked_anew_leads_to_what_is_there_now() {
    const NEW: u64 = 0x8000_0000;
    let mut machine = Machine::new(PagingPath::Shadow, 8 * MIB);
    machine.join();
    one_page(&mut machine);
    machine.poke(0x4008, 0x20_1000 | P_RW_US);
    for gva in [0x40_0000, 0x40_1000] {
        machine.vcpu.translate(Gva::new(gva), READ).unwrap();
    }
    machine.poke(0x2000, 0);
    machine.poke(0x4008, 0x30_1000 | P_RW_US);
    machine.poke(0x2000 + 2 * 8, 0x3000 | P_RW_US);
    for (gva, gpa) in [(0x40_0000, 0x20_0000), (0x40_1000, 0x30_1000)] {
        let got = machine.vcpu.translate(Gva::new(NEW + gva), READ).unwrap();
        assert_eq!(got.gpa.raw(), gpa);
    }
}
