//! What the ways from a guest's address to the host's page cost: `cargo bench -p mmu`.
//!
//! No page of the guest's data is touched, so the host's own page faults are not in the figures; the
//! tables' memory has been used before.

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use addr::{Address, Gpa, Gva};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memory::access as host;
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, SlotFlags, Slots, SlotsConfig};
use mmu::{Access, AccessKind, Mmu, MmuConfig, PagingPath, PagingRegisters, Privilege, VcpuMmu};

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);
const PATHS: [PagingPath; 3] = [PagingPath::Nested, PagingPath::Shadow, PagingPath::Direct];
const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

struct Machine {
    ram: GuestRam,
    slots: Arc<Slots>,
    mmu: Arc<Mmu>,
}

impl Machine {
    fn new(path: PagingPath, bytes: u64) -> Self {
        let ram = GuestRam::new(&RamConfig::new(bytes)).expect("RAM");
        let slots = Slots::new(Domain::new(), SlotsConfig::default());
        let config = MmuConfig {
            path,
            ..MmuConfig::default()
        };
        let mmu = Mmu::new(&slots, config);
        Self { ram, slots, mmu }
    }

    fn slot(&self, bytes: u64, flags: SlotFlags) {
        let region = Region {
            slot: 0,
            flags: flags.bits(),
            gpa: Gpa::new(0),
            size: bytes,
            hva: self.ram.hva(),
        };
        self.slots.set_region(&region).expect("a slot");
    }

    /// A slot in which every page is mapped by itself, nothing mapped yet. (A dirty log asks for
    /// 4 KiB entries; reads are not logged.)
    fn empty_4k_slot(&self) {
        self.slot(0, SlotFlags::empty());
        self.slot(GIB, SlotFlags::LOG_DIRTY_PAGES);
    }

    fn poke(&self, at: u64, value: u64) {
        host::store_word(self.ram.hva().wrapping_add(at), value).expect("RAM");
    }
}

/// Pages in an order that no prefetcher follows.
fn shuffled(pages: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    order
}

/// From the violation to the installed entry, page after page.
fn nested_fault(c: &mut Criterion) {
    let machine = Machine::new(PagingPath::Nested, GIB);
    machine.slot(GIB, SlotFlags::empty());
    let mut vcpu = VcpuMmu::new(&machine.mmu, 0);
    c.bench_function("nested fault, 4 KiB", |b| {
        b.iter_custom(|count| {
            let mut left = count;
            let mut taken = Duration::ZERO;
            while left > 0 {
                machine.empty_4k_slot();
                let pages = left.min(GIB / PAGE);
                let start = Instant::now();
                for page in 0..pages {
                    black_box(vcpu.translate(Gva::new(page * PAGE), READ)).expect("RAM");
                }
                taken += start.elapsed();
                left -= pages;
            }
            taken
        });
    });
}

/// The same in two threads, each in its half of the memory: time per fault of both together.
fn nested_fault_two_threads(c: &mut Criterion) {
    let machine = Machine::new(PagingPath::Nested, GIB);
    machine.slot(GIB, SlotFlags::empty());
    c.bench_function("nested fault, 4 KiB, two threads", |b| {
        b.iter_custom(|count| {
            let mut left = count;
            let mut taken = Duration::ZERO;
            while left > 0 {
                machine.empty_4k_slot();
                let pages = left.min(GIB / PAGE);
                taken += two_threads(&machine.mmu, pages);
                left -= pages;
            }
            taken
        });
    });
}

fn two_threads(mmu: &Arc<Mmu>, pages: u64) -> Duration {
    let start = Barrier::new(2);
    let half = pages.div_ceil(2);
    let run = |id: u64| {
        let mut vcpu = VcpuMmu::new(mmu, id as u32);
        start.wait();
        let begin = Instant::now();
        for page in id * half..((id + 1) * half).min(pages) {
            black_box(vcpu.translate(Gva::new(page * PAGE), READ)).expect("RAM");
        }
        begin.elapsed()
    };
    std::thread::scope(|scope| {
        let run = &run;
        let other = scope.spawn(move || run(1));
        let mine = run(0);
        mine.max(other.join().expect("no panic"))
    })
}

/// 4-level tables at the start of RAM that map `pages` pages from GVA 0 one to one.
fn map_4k(machine: &Machine, pages: u64) -> PagingRegisters {
    const P_RW_A_D: u64 = 0x63;
    machine.poke(0x1000, 0x2000 | P_RW_A_D);
    machine.poke(0x2000, 0x3000 | P_RW_A_D);
    for table in 0..pages.div_ceil(512) {
        let base = 0x10000 + table * PAGE;
        machine.poke(0x3000 + table * 8, base | P_RW_A_D);
        for entry in 0..512 {
            let page = (table * 512 + entry) * PAGE;
            machine.poke(base + entry * 8, page | P_RW_A_D);
        }
    }
    PagingRegisters {
        cr0: 0x8001_0001,
        cr3: 0x1000,
        cr4: 0x20,
        efer: 0xd00,
        ..PagingRegisters::default()
    }
}

/// A TLB miss with everything present.
fn walk(c: &mut Criterion) {
    let mut group = c.benchmark_group("walk, all present");
    for (name, pages) in [("1 MiB", 256), ("256 MiB", 65536)] {
        let order = shuffled(pages);
        for path in PATHS {
            let machine = Machine::new(path, GIB);
            machine.slot(GIB, SlotFlags::empty());
            let mut vcpu = VcpuMmu::new(&machine.mmu, 0);
            let _ = vcpu.set_registers(&map_4k(&machine, pages));
            for page in &order {
                vcpu.translate(Gva::new(page * PAGE), READ).expect("RAM");
            }
            let id = BenchmarkId::new(format!("{path:?}").to_lowercase(), name);
            group.bench_function(id, |b| {
                let mut next = order.iter().cycle();
                b.iter(|| {
                    let page = next.next().expect("a cycle");
                    black_box(vcpu.translate(Gva::new(page * PAGE), READ))
                });
            });
        }
    }
    group.finish();
}

/// Harvesting 1 GiB with every hundredth page dirty: take the log, protect the pages, flush.
fn harvest(c: &mut Criterion) {
    let mut group = c.benchmark_group("harvest 1 GiB, 1 % dirty");
    let pages = GIB / PAGE;
    let dirty: Vec<u64> = shuffled(pages)
        .into_iter()
        .take(pages as usize / 100)
        .collect();
    group.throughput(Throughput::Elements(dirty.len() as u64));
    for path in PATHS {
        let machine = Machine::new(path, GIB);
        machine.slot(GIB, SlotFlags::empty());
        machine.slot(GIB, SlotFlags::LOG_DIRTY_PAGES);
        let mut vcpu = VcpuMmu::new(&machine.mmu, 0);
        let _ = vcpu.set_registers(&map_4k(&machine, pages));
        for page in 0..pages {
            vcpu.translate(Gva::new(page * PAGE), READ).expect("RAM");
        }
        group.bench_function(format!("{path:?}").to_lowercase(), |b| {
            b.iter_custom(|count| {
                let mut taken = Duration::ZERO;
                for _ in 0..count {
                    for page in &dirty {
                        vcpu.translate(Gva::new(page * PAGE), WRITE).expect("RAM");
                    }
                    let start = Instant::now();
                    black_box(machine.slots.harvest(0)).expect("it logs");
                    taken += start.elapsed();
                }
                taken
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    targets = nested_fault, nested_fault_two_threads, walk, harvest
}
criterion_main!(benches);
