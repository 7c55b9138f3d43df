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
