//! The walker on tables that no kernel would write.

mod machine;
mod model;

use addr::{Gpa, Gva};
use machine::{EXECUTE, Machine, PATHS, READ, WRITE, long_mode, registers};
use memory::slot::{Region, SlotFlags};
use mmu::walker::Step;
use mmu::{Access, AccessKind, Fault, PagingFeatures, PagingPath, Privilege, Translation};
use model::ops::Random;
use x86::control::{Cr4, Efer};
use x86::page_fault::PageFaultCode as Code;

const MIB: u64 = 1 << 20;
const P: u64 = 1;
const RW: u64 = 3;

fn on_each_path(mut test: impl FnMut(&mut Machine)) {
    for path in PATHS {
        let mut machine = Machine::new(path, MIB);
        let _ = machine.vcpu.set_registers(&long_mode(0x1000));
        test(&mut machine);
        machine.mmu.check_invariants().unwrap();
    }
}

fn code(answer: Result<Translation, Fault>) -> Code {
    match answer {
        Err(Fault::Page(fault)) => fault.error_code,
        other => panic!("{other:?}"),
    }
}

/// Arbitrary bytes, as the fuzzer draws them, but from few seeds, half of them in the shape that
/// the target gives to its input: then the entries lead to frames that exist.
#[test]
fn arbitrary_bytes() {
    let mut random = Random::new(7);
    for round in 0..20_000 {
        let mut bytes = Vec::new();
        if round % 2 == 0 {
            shaped(&mut random, &mut bytes);
        }
        bytes.extend((0..40).flat_map(|_| random.next().to_le_bytes()));
        model::bytes::walker(&bytes);
    }
}

/// CPUID, registers, and 100 entries.
fn shaped(random: &mut Random, bytes: &mut Vec<u8>) {
    bytes.extend(random.next().to_le_bytes().first_chunk::<3>().unwrap());
    for _ in 0..5 {
        bytes.extend(((random.below(4) << 12) | 1).to_le_bytes());
    }
    bytes.extend((random.next() & random.next()).to_le_bytes());
    bytes.push(100);
    for _ in 0..100 {
        // The ends of the first four frames, where few indices lead.
        let index = [0, 1, 511][random.below(3) as usize];
        bytes.extend((random.below(4) * 4096 + index * 8).to_le_bytes());
        let flags = (random.next() & random.next() & 0xff8) | 7;
        bytes.extend(((random.below(4) << 12) | flags).to_le_bytes());
    }
    for _ in 0..8 {
        let mut gva = random.below(4096);
        for shift in [12, 21, 30, 39, 48] {
            gva |= [0, 1, 511][random.below(3) as usize] << shift;
        }
        bytes.extend(gva.to_le_bytes());
        bytes.push(random.next() as u8);
    }
}

#[test]
fn a_table_that_is_its_own_entry() {
    on_each_path(|machine| {
        machine.poke(0x1000 + 511 * 8, 0x1000 | RW);
        let own = Gva::new(0xffff_ffff_ffff_f000);
        let got = machine.vcpu.translate(own, WRITE).unwrap();
        assert_eq!(got.gpa, Gpa::new(0x1000));
        assert_eq!(machine.peek(0x1000 + 511 * 8), 0x1000 | RW | 0x60);
    });
}

#[test]
fn tables_in_holes_devices_and_behind_the_end() {
    on_each_path(|machine| {
        // The end of RAM: the last entry is there, the next table is not.
        machine.poke(MIB - 8, 0x2000 | RW);
        let at = |cr3| long_mode(cr3);
        let _ = machine.vcpu.set_registers(&at(MIB - 4096));
        let last = Gva::new(0xffff_ff80_0000_0000);
        assert_eq!(code(machine.vcpu.translate(last, READ)), Code::empty());
        for hole in [MIB, 0xfee0_0000, 0x3fff_ffff_f000] {
            let _ = machine.vcpu.set_registers(&at(hole));
            assert_eq!(code(machine.vcpu.translate(last, WRITE)), Code::WRITE);
            let _ = machine.vcpu.set_registers(&at(0x1000));
            machine.poke(0x1000, hole | RW);
            let _ = machine.vcpu.invalidate_all();
            let gone = machine.vcpu.translate(Gva::new(0), READ);
            assert_eq!(code(gone), Code::empty(), "a table at {hole:#x}");
        }
    });
}

#[test]
fn addresses_that_are_not_canonical_do_no_harm() {
    on_each_path(|machine| {
        for gva in [
            0x8000_0000_0000_0000,
            0x0000_8000_0000_0000,
            u64::MAX,
            1 << 62,
        ] {
            for access in [READ, WRITE, EXECUTE] {
                machine.vcpu.translate(Gva::new(gva), access).unwrap_err();
                let _ = machine.vcpu.invalidate_page(Gva::new(gva));
            }
        }
    });
}

#[test]
fn a_table_where_the_host_has_no_memory() {
    for path in PATHS {
        let mut machine = Machine::new(path, MIB);
        let beyond = Region {
            slot: 1,
            flags: 0,
            gpa: Gpa::new(MIB),
            size: MIB,
            // Nothing is ever mapped in a process's first page.
            hva: addr::Hva::new(0),
        };
        machine.slots.set_region(&beyond).unwrap();
        let _ = machine.vcpu.set_registers(&long_mode(MIB));
        let fault = machine.vcpu.translate(Gva::new(0x1008), READ);
        let Err(Fault::Host(fault)) = fault else {
            panic!("{fault:?}");
        };
        assert_eq!(fault.gpa, Gpa::new(MIB));
        assert_eq!(fault.hva, addr::Hva::new(0));
    }
}

#[test]
fn tables_in_rom_keep_their_bits() {
    for path in PATHS {
        let mut machine = Machine::without_slots(path, MIB);
        machine
            .slot(0, Gpa::new(0), 0, MIB / 2, SlotFlags::READONLY)
            .unwrap();
        machine
            .slot(1, Gpa::new(MIB), MIB / 2, MIB / 2, SlotFlags::empty())
            .unwrap();
        for (at, value) in [
            (0x1000, 0x2000),
            (0x2000, 0x3000),
            (0x3000, 0x4000),
            (0x4000, MIB),
        ] {
            machine.poke(at, value | RW);
        }
        let _ = machine.vcpu.set_registers(&long_mode(0x1000));
        assert!(machine.vcpu.translate(Gva::new(8), WRITE).unwrap().writable);
        assert_eq!(machine.peek(0x1000), 0x2000 | RW);
        assert_eq!(machine.peek(0x4000), MIB | RW);
    }
}

#[test]
fn pdptes_are_checked_when_they_are_loaded() {
    let mut machine = Machine::new(PagingPath::Nested, MIB);
    let _ = machine.vcpu.set_features(PagingFeatures {
        max_phys_bits: 36,
        ..PagingFeatures::default()
    });
    machine.poke(0x1020, 0x2000 | P);
    machine.poke(0x1028, 0x1e6); // not present: anything goes
    machine.poke(0x1030, 0);
    machine.poke(0x1038, 0x3000 | P | 0x18);
    let loaded = machine.vcpu.load_pdptrs(0x103f);
    assert_eq!(loaded, Some([0x2001, 0x1e6, 0, 0x3019]));
    for reserved in [1 << 1, 1 << 5, 1 << 8, 1 << 36, 1 << 63] {
        machine.poke(0x1030, P | reserved);
        assert_eq!(machine.vcpu.load_pdptrs(0x1020), None, "{reserved:#x}");
    }
    assert_eq!(machine.vcpu.load_pdptrs(MIB), None, "no memory there");
}

#[test]
fn pse36_reaches_above_4_gib() {
    for path in PATHS {
        let mut machine = Machine::without_slots(path, 8 * MIB);
        machine
            .slot(0, Gpa::new(0), 0, 4 * MIB, SlotFlags::empty())
            .unwrap();
        let high = Gpa::new(0x5_0040_0000);
        machine
            .slot(1, high, 4 * MIB, 4 * MIB, SlotFlags::empty())
            .unwrap();
        let _ = machine
            .vcpu
            .set_registers(&registers(Cr4::PSE, Efer::empty(), 0x1000));
        // 4 MiB page at 0x40_0000, address bits 39:32 in bits 20:13.
        machine.poke(0x1000, 0x40_0000 | 5 << 13 | 0x83);
        let got = machine.vcpu.translate(Gva::new(0x12_3456), READ).unwrap();
        assert_eq!(got.gpa, Gpa::new(0x5_0052_3456));
        assert_eq!(got.hva, machine.host(4 * MIB + 0x12_3456));
    }
}

#[test]
fn a_probe_leaves_no_trace() {
    on_each_path(|machine| {
        for (at, value) in [
            (0x1000, 0x2000),
            (0x2000, 0x3000),
            (0x3000, 0x4000),
            (0x4000, 0x5000),
        ] {
            machine.poke(at, value | RW);
        }
        let mut steps = Vec::new();
        let mut record = |step: Step| steps.push((step.level, step.gpa.raw(), step.value));
        let found = machine
            .vcpu
            .probe(Gva::new(0x123), WRITE, &mut record)
            .unwrap();
        assert_eq!(found.hva, Some(machine.host(0x5123)));
        let expected = [
            (4, 0x1000, 0x2003),
            (3, 0x2000, 0x3003),
            (2, 0x3000, 0x4003),
            (1, 0x4000, 0x5003),
        ];
        assert_eq!(steps, expected);
        assert_eq!(machine.peek(0x4000), 0x5000 | RW, "A and D stay clear");
        assert_eq!(machine.mmu.pages(), [0, 0, 0], "nothing is installed");
        let user = Access::new(AccessKind::Read, Privilege::User);
        let denied = machine.vcpu.probe(Gva::new(0), user, &mut ()).unwrap_err();
        let Fault::Page(fault) = denied else {
            panic!("{denied:?}");
        };
        assert_eq!(fault.error_code, Code::PRESENT | Code::USER);
    });
}

#[test]
fn fetches_are_told_apart_only_with_nx_or_smep() {
    on_each_path(|machine| {
        let got = code(machine.vcpu.translate(Gva::new(0), EXECUTE));
        assert_eq!(got, Code::FETCH);
        let plain = registers(Cr4::PAE, Efer::LME | Efer::LMA, 0x1000);
        let _ = machine.vcpu.set_registers(&plain);
        assert_eq!(
            code(machine.vcpu.translate(Gva::new(0), EXECUTE)),
            Code::empty()
        );
        let smep = registers(Cr4::PAE | Cr4::SMEP, Efer::LME | Efer::LMA, 0x1000);
        let _ = machine.vcpu.set_registers(&smep);
        assert_eq!(
            code(machine.vcpu.translate(Gva::new(0), EXECUTE)),
            Code::FETCH
        );
    });
}
