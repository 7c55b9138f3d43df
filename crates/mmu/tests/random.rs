//! Random guests on every path, against the model: same answers, same faults, same bits in the
//! guest's tables, same dirty logs.
//!
//! The guest behaves as the architecture asks: after it changed a table it invalidates, all or the
//! one page that it goes on to touch. Stores are made as guests make them: by a translation for
//! writing (of a second vCPU, which has paging off), then through the host address that it gave.

mod machine;
mod model;

use std::collections::BTreeSet;

use addr::{Gva, PageSize};
use machine::Machine;
use memory::access as host;
use memory::slot::SlotFlags;
use mmu::{
    Access, AccessKind, Fault, GigabytePages, PagingFeatures, PagingPath, Privilege, Translation,
    VcpuMmu, Vendor,
};
use model::ops::{MIB, Op, RAM, Random, TABLE_BYTES, Temper};
use model::{Answer, Cpuid, Model, Slot};

/// One path under test.
struct Subject {
    machine: Machine,
    /// A vCPU with paging off, which makes the guest's stores.
    writer: VcpuMmu,
}

impl Subject {
    fn new(path: PagingPath, cpuid: Cpuid) -> Self {
        let mut machine = Machine::without_slots(path, RAM);
        let none = SlotFlags::empty();
        machine
            .slot(0, addr::Gpa::new(0), 0, 4 * MIB, none)
            .expect("slot 0");
        let _ = machine.vcpu.set_features(features(cpuid));
        machine.join();
        let writer = VcpuMmu::new(&machine.mmu, 1);
        Self { machine, writer }
    }

    fn store(&mut self, gpa: u64, value: u64, bytes: usize) {
        let write = Access::new(AccessKind::Write, Privilege::Supervisor);
        if let Ok(at) = self.writer.translate(Gva::new(gpa), write) {
            host::store(at.hva, value, bytes).expect("RAM is there");
        }
    }

    fn check(&mut self, gva: u64, access: Access, expected: Result<Answer, Fault>) {
        let got = self.machine.vcpu.translate(Gva::new(gva), access);
        match (got, expected) {
            (Ok(got), Ok(expected)) => self.check_answer(&got, &expected, access),
            (Err(Fault::ReadOnly { gpa, hva }), Err(Fault::ReadOnly { gpa: e, hva: at })) => {
                assert_eq!((gpa, self.offset(hva)), (e, at.raw()));
            }
            (Err(got), Err(expected)) => assert_eq!(got, expected),
            (got, expected) => panic!("got {got:x?}, expected {expected:x?}"),
        }
    }

    fn offset(&self, hva: addr::Hva) -> u64 {
        hva.raw() - self.machine.ram.hva().raw()
    }

    fn check_answer(&self, got: &Translation, expected: &Answer, access: Access) {
        let seen = Answer {
            gpa: got.gpa.raw(),
            offset: self.offset(got.hva),
            guest_page: expected.guest_page,
            user: got.user,
            readable: got.readable,
            // A path may ask once more before it lets writes go on.
            writable: expected.writable && (got.writable || access.kind != AccessKind::Write),
            executable: got.executable,
            global: got.global,
            pkey: got.pkey,
        };
        assert_eq!(seen, *expected);
        assert!(expected.writable || !got.writable, "writable: {got:?}");
        let most = match expected.guest_page {
            4096 => PageSize::Size4K,
            0x20_0000 => PageSize::Size2M,
            0x40_0000 => PageSize::Size4M,
            _ => PageSize::Size1G,
        };
        assert!(got.size <= most, "{:?} in {most:?}", got.size);
    }

    fn check_memory(&self, model: &Model) {
        let mut bytes = vec![0; TABLE_BYTES as usize];
        host::read(self.machine.ram.hva(), &mut bytes).expect("RAM is there");
        let first = bytes.iter().zip(&model.ram).position(|(a, b)| a != b);
        assert_eq!(first, None, "memory differs at this offset");
    }

    fn harvest(&self, number: u32) -> Option<BTreeSet<(u32, u64)>> {
        let words = self.machine.slots.harvest(number).ok()?;
        let page = |n: u64| words[n as usize / 64] >> (n % 64) & 1 == 1;
        let pages = 0..words.len() as u64 * 64;
        Some(pages.filter(|n| page(*n)).map(|n| (number, n)).collect())
    }
}

fn features(cpuid: Cpuid) -> PagingFeatures {
    PagingFeatures {
        max_phys_bits: cpuid.max_phys_bits as u8,
        gigabyte_pages: if cpuid.gigabyte_pages {
            GigabytePages::Supported
        } else {
            GigabytePages::Reserved
        },
        vendor: if cpuid.amd {
            Vendor::Amd
        } else {
            Vendor::Intel
        },
    }
}

fn model(cpuid: Cpuid) -> Model {
    Model {
        ram: vec![0; RAM as usize],
        slots: vec![Slot {
            number: 0,
            gpa: 0,
            bytes: 4 * MIB,
            offset: 0,
            readonly: false,
            logged: false,
        }],
        registers: mmu::PagingRegisters::default(),
        cpuid,
        dirty: BTreeSet::new(),
    }
}

/// The model's side of a change of slots, as far as the change is a legal one.
fn change_slot(model: &mut Model, number: u32, new: Option<Slot>) {
    model.slots.retain(|s| s.number != number);
    match new {
        Some(slot) => {
            model.slots.push(slot);
            if !slot.logged {
                model.dirty.retain(|(n, _)| *n != number);
            }
        }
        None => model.dirty.retain(|(n, _)| *n != number),
    }
}

/// How often each kind of answer came, so that a generator which draws only faults shows.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    translated: u64,
    not_present: u64,
    forbidden: u64,
    reserved: u64,
    mmio: u64,
    readonly: u64,
}

impl Tally {
    fn count(&mut self, answer: &Result<Answer, Fault>) {
        use x86::page_fault::PageFaultCode as Code;
        let place = match answer {
            Ok(_) => &mut self.translated,
            Err(Fault::Mmio { .. }) => &mut self.mmio,
            Err(Fault::ReadOnly { .. }) => &mut self.readonly,
            Err(Fault::Host(fault)) => panic!("{fault:?}"),
            Err(Fault::Page(f)) if f.error_code.contains(Code::RESERVED) => &mut self.reserved,
            Err(Fault::Page(f)) if f.error_code.contains(Code::PRESENT) => &mut self.forbidden,
            Err(Fault::Page(_)) => &mut self.not_present,
        };
        *place += 1;
    }

    /// Whether the common kinds came often enough in so many answers.
    fn is_varied(&self, steps: usize) -> bool {
        let least = steps as u64 / 40;
        let common = [
            self.translated,
            self.not_present,
            self.forbidden,
            self.reserved,
            self.mmio,
        ];
        common.iter().all(|n| *n >= least)
    }
}

struct Run {
    temper: Temper,
    tally: Tally,
    random: Random,
    model: Model,
    subjects: Vec<Subject>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cpuid = Cpuid {
            max_phys_bits: random.pick(&[36, 40, 46, 52]),
            gigabyte_pages: !random.once_in(3),
            amd: random.once_in(3),
        };
        let subjects = machine::PATHS.map(|path| Subject::new(path, cpuid));
        Self {
            temper: random.pick(&[Temper::Busy, Temper::Calm]),
            tally: Tally::default(),
            random,
            model: model(cpuid),
            subjects: subjects.into(),
        }
    }

    fn steps(&mut self, count: usize) {
        for (gpa, value, bytes) in self.random.fill() {
            self.store(gpa, value, bytes);
        }
        for step in 0..count {
            let bits32 = self.model.registers.cr4 & 0x20 == 0;
            let op = self.random.op(bits32, self.temper);
            let context = (step, op, self.model.registers);
            let applied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                self.apply(op);
                if step % 256 == 255 {
                    self.check();
                }
            }));
            if let Err(panic) = applied {
                eprintln!("at step, op, registers: {context:x?}");
                std::panic::resume_unwind(panic);
            }
        }
        self.check();
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Translate { gva, access } => self.translate(gva, access),
            Op::Twice { gva, first, second } => {
                self.translate(gva, first);
                self.translate(gva, second);
            }
            Op::Store { gpa, value, bytes } => {
                self.store(gpa, value, bytes);
                self.flush();
            }
            Op::StoreOne {
                gpa,
                value,
                bytes,
                gva,
                access,
            } => {
                // Touched before, so that a stale translation could be there.
                self.translate(gva, access);
                self.store(gpa, value, bytes);
                for subject in &mut self.subjects {
                    let _ = subject.machine.vcpu.invalidate_page(Gva::new(gva));
                }
                self.translate(gva, access);
                self.flush();
            }
            Op::Registers(registers) => {
                self.model.registers = registers;
                for subject in &mut self.subjects {
                    let _ = subject.machine.vcpu.set_registers(&registers);
                }
            }
            Op::Region {
                number,
                gpa,
                bytes,
                offset,
                flags,
            } => self.region(number, gpa, bytes, offset, flags),
            Op::Harvest(number) => self.harvest(number),
        }
    }

    fn translate(&mut self, gva: u64, access: Access) {
        let offsets = addr::Hva::new(0);
        let expected = self.model.translate(gva, access, offsets);
        self.tally.count(&expected);
        for subject in &mut self.subjects {
            subject.check(gva, access, expected);
        }
    }

    fn store(&mut self, gpa: u64, value: u64, bytes: usize) {
        self.model.store(gpa, value, bytes);
        for subject in &mut self.subjects {
            subject.store(gpa, value, bytes);
        }
    }

    fn flush(&mut self) {
        for subject in &mut self.subjects {
            let _ = subject.machine.vcpu.invalidate_all();
        }
    }

    fn region(&mut self, number: u32, gpa: addr::Gpa, bytes: u64, offset: u64, flags: SlotFlags) {
        let done: Vec<_> = self
            .subjects
            .iter()
            .map(|s| s.machine.slot(number, gpa, offset, bytes, flags).is_ok())
            .collect();
        assert!(done.iter().all(|d| *d == done[0]), "{done:?}");
        if done[0] {
            let slot = Slot {
                number,
                gpa: gpa.raw(),
                bytes,
                offset,
                readonly: flags.contains(SlotFlags::READONLY),
                logged: flags.contains(SlotFlags::LOG_DIRTY_PAGES),
            };
            change_slot(&mut self.model, number, (bytes != 0).then_some(slot));
        }
    }

    fn harvest(&mut self, number: u32) {
        let logged = self
            .model
            .slots
            .iter()
            .any(|s| s.number == number && s.logged);
        let expected: BTreeSet<_> = self
            .model
            .dirty
            .iter()
            .copied()
            .filter(|(n, _)| *n == number)
            .collect();
        for subject in &self.subjects {
            let got = subject.harvest(number);
            assert_eq!(got, logged.then(|| expected.clone()));
        }
        self.model.dirty.retain(|(n, _)| *n != number);
    }

    /// What the paths did, for a reader of the log.
    fn report(&self) {
        for subject in &self.subjects {
            let mmu = &subject.machine.mmu;
            let stats = subject.machine.vcpu.stats();
            eprintln!(
                "{:?}: {} faults, pages {:?}, {:?}, {} flushes",
                mmu.path(),
                stats.pf_taken.get(),
                mmu.pages(),
                mmu.shadow_stats(),
                mmu.stats().remote_tlb_flush.get(),
            );
        }
    }

    fn check(&self) {
        for subject in &self.subjects {
            subject.check_memory(&self.model);
            subject.machine.mmu.check_invariants().unwrap();
        }
    }
}

/// Steps of one run; each is applied to all three paths.
const STEPS: usize = 26_000;

fn runs(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        eprintln!("seed {seed}");
        let mut run = Run::new(seed);
        run.steps(STEPS);
        eprintln!("{:?}", run.tally);
        run.report();
        assert!(run.tally.is_varied(STEPS), "the generator is lopsided");
    }
}

// Four tests of 7 runs of 26,000 operations on three paths: 2,184,000 operations.

#[test]
fn random_guests_1() {
    runs(0..7);
}

#[test]
fn random_guests_2() {
    runs(100..107);
}

#[test]
fn random_guests_3() {
    runs(200..207);
}

#[test]
fn random_guests_4() {
    runs(300..307);
}
