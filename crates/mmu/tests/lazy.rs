//! The lazy MMU at work: what a first access installs, and what takes it away again.

mod machine;

use std::sync::{Arc, Mutex};

use addr::{Gpa, Gva, PageSize};
use machine::{Machine, PATHS, READ, WRITE, long_mode, one_page};
use memory::slot::SlotFlags;
use mmu::event::{Cause, FaultEvent, Subscriber};
use mmu::{Fault, PagingPath};

const MIB: u64 = 1 << 20;
const P_RW_US: u64 = 7;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;

#[test]
fn a_nested_fault_installs_once() {
    let mut machine = Machine::new(PagingPath::Nested, 8 * MIB);
    one_page(&mut machine);
    let gva = Gva::new(0x40_0123);
    let got = machine.vcpu.translate(gva, READ).unwrap();
    assert_eq!(got.gpa, Gpa::new(0x20_0123));
    assert_eq!(got.hva, machine.host(0x20_0123));
    assert_eq!(got.size, PageSize::Size4K);
    assert!(
        got.user && !got.writable,
        "D is clear: a write must be seen"
    );
    assert_eq!(
        machine.mmu.pages(),
        [0, 2, 0],
        "tables' 2 MiB and the page's"
    );
    let faults = machine.vcpu.stats().pf_fixed.get();
    assert_eq!(machine.vcpu.translate(gva, READ), Ok(got));
    assert_eq!(machine.vcpu.stats().pf_fixed.get(), faults, "hit");
    machine.mmu.check_invariants().unwrap();
}

#[test]
fn accessed_and_dirty_as_the_manual_says() {
    for path in PATHS {
        let mut machine = Machine::new(path, 8 * MIB);
        one_page(&mut machine);
        let gva = Gva::new(0x40_0000);
        machine.vcpu.translate(gva, READ).unwrap();
        assert_eq!(machine.peek(0x1000), 0x2000 | P_RW_US | A);
        assert_eq!(machine.peek(0x4000), 0x20_0000 | P_RW_US | A);
        assert!(machine.vcpu.translate(gva, WRITE).unwrap().writable);
        assert_eq!(machine.peek(0x3010), 0x4000 | P_RW_US | A);
        assert_eq!(machine.peek(0x4000), 0x20_0000 | P_RW_US | A | D);
        assert!(machine.vcpu.translate(gva, READ).unwrap().writable);
    }
}

#[test]
fn a_deleted_slot_is_gone_at_once() {
    for path in PATHS {
        let mut machine = Machine::without_slots(path, 8 * MIB);
        let none = SlotFlags::empty();
        machine.slot(0, Gpa::new(0), 0, MIB, none).unwrap();
        machine.slot(1, Gpa::new(2 * MIB), MIB, MIB, none).unwrap();
        one_page(&mut machine);
        let gva = Gva::new(0x40_0000);
        let got = machine.vcpu.translate(gva, READ).unwrap();
        assert_eq!(got.hva, machine.host(MIB));
        machine.slot(1, Gpa::new(4 * MIB), MIB, MIB, none).unwrap();
        let gone = machine.vcpu.translate(gva, READ);
        assert_eq!(
            gone,
            Err(Fault::Mmio {
                gpa: Gpa::new(2 * MIB)
            })
        );
        machine.mmu.check_invariants().unwrap();
    }
}

#[test]
fn a_dirty_log_splits_and_its_end_rebuilds() {
    let mut machine = Machine::new(PagingPath::Nested, 8 * MIB);
    let at = |machine: &mut Machine, access| {
        let got = machine.vcpu.translate(Gva::new(0x20_3000), access).unwrap();
        (got.size, got.writable)
    };
    assert_eq!(at(&mut machine, READ), (PageSize::Size2M, true));
    let log = SlotFlags::LOG_DIRTY_PAGES;
    machine.slot(0, Gpa::new(0), 0, 8 * MIB, log).unwrap();
    assert_eq!(machine.mmu.pages(), [512, 0, 0]);
    assert_eq!(at(&mut machine, READ), (PageSize::Size4K, false));
    assert_eq!(at(&mut machine, WRITE), (PageSize::Size4K, true));
    assert_eq!(machine.slots.harvest(0).unwrap()[8], 1 << 3);
    assert_eq!(
        at(&mut machine, READ),
        (PageSize::Size4K, false),
        "protected"
    );
    assert_eq!(machine.slots.harvest(0).unwrap(), [0; 32]);
    at(&mut machine, WRITE);
    machine
        .slot(0, Gpa::new(0), 0, 8 * MIB, SlotFlags::empty())
        .unwrap();
    assert_eq!(at(&mut machine, READ), (PageSize::Size2M, true));
    assert_eq!(machine.mmu.pages(), [0, 1, 0]);
    machine.mmu.check_invariants().unwrap();
}

#[test]
fn readonly_slots_refuse_writes_only() {
    for path in PATHS {
        let mut machine = Machine::without_slots(path, MIB);
        machine
            .slot(0, Gpa::new(0), 0, MIB, SlotFlags::READONLY)
            .unwrap();
        let gpa = Gpa::new(0x5008);
        let got = machine.vcpu.translate(Gva::new(0x5008), READ).unwrap();
        assert!(!got.writable);
        let hva = machine.host(0x5008);
        let refused = machine.vcpu.translate(Gva::new(0x5008), WRITE);
        assert_eq!(refused, Err(Fault::ReadOnly { gpa, hva }));
    }
}

#[test]
fn a_large_page_of_the_guest_meets_small_slots() {
    let mut machine = Machine::without_slots(PagingPath::Nested, 8 * MIB);
    let none = SlotFlags::empty();
    machine.slot(0, Gpa::new(0), 0, MIB, none).unwrap();
    machine
        .slot(1, Gpa::new(2 * MIB), MIB, 3 * MIB, none)
        .unwrap();
    machine.poke(0x1000, 0x2000 | P_RW_US);
    machine.poke(0x2000, P_RW_US | PS);
    let _ = machine.vcpu.set_registers(&long_mode(0x1000));
    let size_at =
        |machine: &mut Machine, gva| machine.vcpu.translate(Gva::new(gva), READ).map(|t| t.size);
    assert_eq!(size_at(&mut machine, 0), Ok(PageSize::Size4K));
    assert_eq!(size_at(&mut machine, 3 * MIB), Ok(PageSize::Size2M));
    assert_eq!(size_at(&mut machine, 4 * MIB), Ok(PageSize::Size4K));
    let hole = Fault::Mmio { gpa: Gpa::new(MIB) };
    assert_eq!(size_at(&mut machine, MIB), Err(hole));
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<FaultEvent>>>);

impl Subscriber for Log {
    fn fault(&self, event: &FaultEvent) {
        self.0.lock().unwrap().push(*event);
    }
}

#[test]
fn a_subscriber_sees_each_fault() {
    let mut machine = Machine::new(PagingPath::Nested, 8 * MIB);
    one_page(&mut machine);
    let log = Log::default();
    machine.mmu.set_subscriber(Some(Box::new(log.clone())));
    let gva = Gva::new(0x40_0008);
    machine.vcpu.translate(gva, READ).unwrap();
    machine.vcpu.translate(gva, READ).unwrap();
    machine
        .vcpu
        .translate(Gva::new(0x80_0000), READ)
        .unwrap_err();
    machine.mmu.set_subscriber(None);
    machine
        .vcpu
        .translate(Gva::new(0xc0_0000), READ)
        .unwrap_err();
    let events = log.0.lock().unwrap();
    let causes: Vec<_> = events.iter().map(|e| e.cause).collect();
    let guest = Cause::Guest(x86::page_fault::PageFaultCode::empty());
    assert_eq!(causes, [Cause::NotPresent, Cause::NotPresent, guest]);
    let table = &events[0];
    assert_eq!(
        table.gpa,
        Some(Gpa::new(0x1000)),
        "the guest's own table faults first"
    );
    let page = &events[1];
    assert_eq!((page.gva, page.gpa), (gva, Some(Gpa::new(0x20_0008))));
    assert_eq!(page.hva, Some(machine.host(0x20_0008)));
    assert_eq!(page.installed.unwrap().size, PageSize::Size2M);
}
