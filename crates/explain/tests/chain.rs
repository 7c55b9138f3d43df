//! A guest table built by hand, and the answers for addresses that go different ways.

use std::sync::Arc;

use addr::{Address, Gpa, Gva, Hva};
use explain::{Chain, GuestSide, Question, Search, Target, explain_own};
use memory::access::store_word;
use memory::pagemap::Pagemap;
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig};
use mmu::{Access, AccessKind, Mmu, MmuConfig, PagingRegisters, Privilege, VcpuMmu};
use x86::control::{Cr0, Cr4, Efer};

const RAM: u64 = 4 << 20;
const PML4: u64 = 0x1000;
const FLAGS: u64 = 0x3; // present, writable

struct Machine {
    ram: GuestRam,
    mmu: Arc<Mmu>,
}

impl Machine {
    /// 4 MiB at guest physical 0; tables that map GVA `0x4000_0000` + n pages.
    fn new() -> Self {
        let ram = GuestRam::new(&RamConfig::new(RAM)).unwrap();
        let slots = Slots::new(Domain::new(), SlotsConfig::default());
        slots
            .set_region(&Region {
                slot: 0,
                flags: 0,
                gpa: Gpa::new(0),
                size: RAM,
                hva: ram.hva(),
            })
            .unwrap();
        let mmu = Mmu::new(&slots, MmuConfig::default());
        let machine = Self { ram, mmu };
        machine.entry(PML4, 0, 0x2000 | FLAGS);
        machine.entry(0x2000, 1, 0x3000 | FLAGS);
        machine.entry(0x3000, 0, 0x4000 | FLAGS);
        machine.entry(0x4000, 0, 0x10_0000 | FLAGS); // RAM
        machine.entry(0x4000, 1, 0xfee0_0000 | FLAGS); // no memslot
        machine
    }

    fn hva(&self, gpa: u64) -> Hva {
        self.ram.hva().checked_add(gpa).unwrap()
    }

    fn entry(&self, table: u64, index: u64, value: u64) {
        store_word::<u64>(self.hva(table + index * 8), value).unwrap();
    }

    fn registers() -> PagingRegisters {
        PagingRegisters {
            cr0: (Cr0::PE | Cr0::PG | Cr0::WP).bits(),
            cr3: PML4,
            cr4: Cr4::PAE.bits(),
            efer: (Efer::LME | Efer::LMA).bits(),
            ..Default::default()
        }
    }

    fn explain(&self, gva: u64, kind: AccessKind) -> Chain {
        let question = Question {
            target: Target::Gva(Gva::new(gva)),
            access: Access::new(kind, Privilege::Supervisor),
            search: Search::Whole,
        };
        let pagemap = Pagemap::of_self().unwrap();
        explain_own(
            &self.mmu,
            &pagemap,
            (Self::registers(), mmu::PagingFeatures::default()),
            &question,
        )
        .unwrap()
    }
}

#[test]
fn ram_is_followed_to_the_host() {
    let machine = Machine::new();
    store_word::<u64>(machine.hva(0x10_0000), 1).unwrap();
    let chain = machine.explain(0x4000_0123, AccessKind::Read);
    let names = chain.entries.iter();
    let names: Vec<_> = names.map(|e| (&*e.name, e.index)).collect();
    assert_eq!(names, [("PML4E", 0), ("PDPTE", 1), ("PDE", 0), ("PTE", 0)]);
    assert_eq!(chain.gpa, Some(Gpa::new(0x10_0123)));
    assert_eq!(chain.slot.as_ref().unwrap().offset, 0x10_0123);
    let host = chain.host.as_ref().unwrap();
    assert_eq!(host.hva, machine.hva(0x10_0123));
    assert_eq!(host.file_offset, Some(0x10_0123));
    assert!(host.state.starts_with("present"), "{}", host.state);
}

#[test]
fn explaining_changes_nothing_and_sees_what_a_fault_installs() {
    let machine = Machine::new();
    let last = |chain: &Chain| chain.nested().unwrap().last().unwrap().hva;
    let before = machine.explain(0x4000_0000, AccessKind::Write);
    assert_eq!(last(&before), None);
    assert!(!before.entries[3].flags.iter().any(|f| f == "A"));
    assert_eq!(last(&machine.explain(0x4000_0000, AccessKind::Write)), None);

    let mut vcpu = VcpuMmu::new(&machine.mmu, 0);
    let _ = vcpu.set_registers(&Machine::registers());
    let write = Access::new(AccessKind::Write, Privilege::Supervisor);
    vcpu.translate(Gva::new(0x4000_0000), write).unwrap();
    let after = machine.explain(0x4000_0000, AccessKind::Write);
    assert_eq!(last(&after), Some(machine.hva(0x10_0000)));
    assert!(
        after.entries[3].flags.iter().any(|f| f == "A")
            && after.entries[3].flags.iter().any(|f| f == "D")
    );
}

#[test]
fn a_device_is_in_no_slot() {
    let chain = Machine::new().explain(0x4000_1000, AccessKind::Write);
    assert_eq!(chain.gpa, Some(Gpa::new(0xfee0_0000)));
    assert!(chain.slot.is_none() && chain.host.is_none());
    assert!(chain.to_string().contains("in no memslot"));
}

#[test]
fn a_missing_entry_says_where_and_which_error_code() {
    let chain = Machine::new().explain(0x4000_2000, AccessKind::Write);
    let Some(GuestSide::PageFault {
        error_code,
        reasons,
        rule,
    }) = &chain.guest
    else {
        panic!("{chain}");
    };
    assert_eq!(*error_code, 2);
    assert_eq!(reasons[..], ["page not present", "write"]);
    assert_eq!(chain.entries.last().unwrap().name, "PTE");
    assert_eq!(rule, "the PTE at gpa 0x4010 has P clear");
}

#[test]
fn the_answer_is_json_too() {
    let chain = Machine::new().explain(0x4000_0000, AccessKind::Read);
    let json: serde_json::Value = serde_json::to_value(&chain).unwrap();
    assert_eq!(json["gva"], "0x40000000");
    assert_eq!(json["guest"]["outcome"], "page");
    assert_eq!(json["guest"]["gpa"], "0x100000");
    assert_eq!(json["entries"][0]["name"], "PML4E");
}
