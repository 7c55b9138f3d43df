//! Entries of the second level by the size of the host's own pages, as kvm.ko has them.

mod machine;

use addr::{Address, Gpa, Gva, PageSize};
use machine::{Machine, READ, WRITE};
use memory::pagemap;
use memory::ram::{GuestRam, RamConfig, Thp};
use memory::slot::{Region, SlotFlags};
use mmu::{LargePages, MmuConfig};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

/// A machine without paging whose RAM is `ram`.
fn machine(ram: &GuestRam) -> Machine {
    let config = MmuConfig {
        large_pages: LargePages::OfHost,
        ..MmuConfig::default()
    };
    let machine = Machine::with_config(config, SIZE);
    set_slot(&machine, ram, 0, SlotFlags::empty());
    set_slot(&machine, ram, SIZE, SlotFlags::empty());
    machine
}

fn set_slot(machine: &Machine, ram: &GuestRam, size: u64, flags: SlotFlags) {
    let hva = if size == 0 {
        machine.host(0)
    } else {
        ram.hva()
    };
    let region = Region {
        slot: 0,
        flags: flags.bits(),
        gpa: Gpa::new(0),
        size,
        hva,
    };
    machine.slots.set_region(&region).unwrap();
}

fn ram(thp: Thp) -> GuestRam {
    let mut config = RamConfig::private(SIZE);
    config.thp = thp;
    GuestRam::new(&config).unwrap()
}

fn touch(machine: &mut Machine) {
    for page in 0..SIZE / 4096 {
        machine
            .vcpu
            .translate(Gva::new(page * 4096), WRITE)
            .unwrap();
    }
}

#[test]
fn small_host_pages_get_small_entries() {
    let ram = ram(Thp::Never);
    let mut machine = machine(&ram);
    let got = machine.vcpu.translate(Gva::new(0x1000), READ).unwrap();
    assert_eq!(got.size, PageSize::Size4K);
    assert_eq!(machine.mmu.pages(), [1, 0, 0]);
    touch(&mut machine);
    assert_eq!(machine.mmu.pages(), [SIZE / 4096, 0, 0]);
    // The end of a dirty log leaves them alone.
    set_slot(&machine, &ram, SIZE, SlotFlags::LOG_DIRTY_PAGES);
    set_slot(&machine, &ram, SIZE, SlotFlags::empty());
    assert_eq!(machine.mmu.pages(), [SIZE / 4096, 0, 0]);
    machine.mmu.check_invariants().unwrap();
}

#[test]
fn huge_host_pages_get_large_entries_but_for_a_dirty_log() {
    let ram = ram(Thp::Advise);
    let start = ram.hva();
    if !start.is_aligned(PageSize::Size2M) {
        println!("SKIPPED: the RAM is not aligned to 2 MiB");
        return;
    }
    let mut machine = machine(&ram);
    touch(&mut machine);
    let huge: u64 = pagemap::huge_ranges(ram.range())
        .iter()
        .map(|range| range.len() / (2 * MIB))
        .sum();
    if huge != SIZE / (2 * MIB) {
        println!("SKIPPED: the host gave {huge} huge pages");
        return;
    }
    assert_eq!(machine.mmu.pages(), [0, huge, 0]);
    set_slot(&machine, &ram, SIZE, SlotFlags::LOG_DIRTY_PAGES);
    assert_eq!(machine.mmu.pages(), [SIZE / 4096, 0, 0], "all are split");
    touch(&mut machine);
    assert_eq!(machine.mmu.pages(), [SIZE / 4096, 0, 0]);
    set_slot(&machine, &ram, SIZE, SlotFlags::empty());
    touch(&mut machine);
    assert_eq!(machine.mmu.pages(), [0, huge, 0], "and large again");
    machine.mmu.check_invariants().unwrap();
}

#[test]
fn a_page_that_is_not_there_is_provided_before_its_size_is_asked() {
    let ram = ram(Thp::Never);
    let mut machine = machine(&ram);
    let gva = Gva::new(2 * MIB + 0x3000);
    machine.vcpu.translate(gva, WRITE).unwrap();
    let page = ram.hva().wrapping_add(gva.raw());
    let host = pagemap::Pagemap::of_self().unwrap().look_up(page).unwrap();
    assert_ne!(host.entry.state, pagemap::PageState::Absent);
}
