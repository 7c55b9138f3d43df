//! Memory slots: look-up, change, harvest of the dirty log; and the cost of an access at an HVA.

use std::hint::black_box;
use std::sync::Arc;

use addr::{Address, Gfn, Gpa, Hva};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use memory::access;
use memory::quiesce::{Domain, Kick, Requests};
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig, USER_SLOTS};

const PAGE: u64 = 4096;
/// Pages of one slot; the same number of pages lies between two slots.
const PAGES: u64 = 16;

fn region(number: u64) -> Region {
    Region {
        slot: number as u32,
        flags: 0,
        gpa: Gpa::new(number * 2 * PAGES * PAGE),
        size: PAGES * PAGE,
        hva: Hva::new(0x10_0000_0000 + number * PAGES * PAGE),
    }
}

fn slots(count: u64) -> Arc<Slots> {
    let slots = Slots::new(Domain::new(), SlotsConfig::default());
    for number in 0..count {
        slots
            .set_region(&region(number))
            .expect("they do not overlap");
    }
    slots
}

/// Frames in slots, in an order that no cache and no branch predictor foresees.
fn random_frames(count: u64) -> Vec<Gfn> {
    let mut random = fastrand::Rng::with_seed(1);
    std::iter::repeat_with(|| Gfn::new(random.u64(..count) * 2 * PAGES + random.u64(..PAGES)))
        .take(1 << 16)
        .collect()
}

fn look_up(c: &mut Criterion) {
    let mut group = c.benchmark_group("slot look-up");
    for count in [1, 64, u64::from(USER_SLOTS)] {
        let slots = slots(count);
        let frames = random_frames(count);
        let mut at = 0;
        let mut next = move || {
            at = (at + 1) % frames.len();
            frames[at]
        };
        group.bench_function(format!("snapshot and find, {count} slots"), |b| {
            b.iter(|| slots.snapshot(0).find(black_box(next())).map(|s| s.hva));
        });
        let mut reader = slots.reader(0);
        group.bench_function(format!("a vCPU's reader, random, {count} slots"), |b| {
            b.iter(|| reader.find(black_box(next())).map(|s| s.hva));
        });
        let same = Gfn::new(0);
        group.bench_function(
            format!("a vCPU's reader, the same slot, {count} slots"),
            |b| {
                b.iter(|| reader.find(black_box(same)).map(|s| s.hva));
            },
        );
    }
}

fn change(c: &mut Criterion) {
    let count = u64::from(USER_SLOTS);
    let slots = slots(count);
    let mut group = c.benchmark_group("slot change");
    let middle = region(count / 2);
    let gone = Region { size: 0, ..middle };
    group.bench_function("delete and insert among 32,764", |b| {
        b.iter(|| {
            slots.set_region(&gone).expect("it is there");
            slots.set_region(&middle).expect("it is gone");
        });
    });
}

fn harvest(c: &mut Criterion) {
    const GIB_PAGES: u64 = 1 << 18;
    let slots = Slots::new(Domain::new(), SlotsConfig::default());
    let region = Region {
        slot: 0,
        flags: 1,
        gpa: Gpa::new(0),
        size: GIB_PAGES * PAGE,
        hva: Hva::new(0x10_0000_0000),
    };
    slots.set_region(&region).expect("the only slot");
    let table = slots.snapshot(0);
    let slot = table.find(Gfn::new(0)).expect("it was just made");
    let mut group = c.benchmark_group("dirty log");
    group.throughput(Throughput::Bytes(GIB_PAGES * PAGE));
    for (name, step) in [("1 % dirty", 100), ("clean", u64::MAX), ("all dirty", 1)] {
        group.bench_function(format!("harvest of 1 GiB, {name}"), |b| {
            b.iter_batched(
                || {
                    for page in (0..GIB_PAGES).step_by(usize::try_from(step).unwrap_or(usize::MAX))
                    {
                        slot.mark_dirty(Gfn::new(page));
                    }
                },
                |()| slots.harvest(0).expect("it logs"),
                BatchSize::PerIteration,
            );
        });
    }
    group.throughput(Throughput::Elements(1));
    let mut page = 0;
    group.bench_function("mark a page that is dirty already", |b| {
        b.iter(|| {
            page = (page + 1) % 64;
            slot.mark_dirty(Gfn::new(black_box(page)))
        });
    });
}

fn accesses(c: &mut Criterion) {
    let ram = GuestRam::new(&RamConfig::new(1 << 20)).expect("a MiB of RAM");
    access::fill(ram.hva(), 1, ram.size()).expect("it is mapped");
    let hva = ram.hva();
    let mut group = c.benchmark_group("access");
    group.bench_function("load of 8 bytes", |b| {
        b.iter(|| access::load_word::<u64>(black_box(hva)));
    });
    group.bench_function("store of 8 bytes", |b| {
        b.iter(|| access::store_word(black_box(hva), 1_u64));
    });
    group.bench_function("compare-exchange of 8 bytes", |b| {
        b.iter(|| access::compare_exchange(black_box(hva), 1_u64, 1));
    });
    let mut page = vec![0; PAGE as usize];
    group.bench_function("copy of 4 KiB", |b| {
        b.iter(|| access::read(black_box(hva), &mut page));
    });
    let nowhere = Hva::new(0x1000);
    group.bench_function("load that faults", |b| {
        b.iter(|| access::load_word::<u64>(black_box(nowhere)));
    });
    let end = hva.wrapping_add(ram.size());
    assert!(access::read(end.wrapping_add(u64::MAX), &mut [0]).is_ok());
}

struct Deaf;

impl Kick for Deaf {
    fn kick(&self, _requests: Requests) {}
}

fn quiesce(c: &mut Criterion) {
    let domain = Domain::new();
    let vcpu = domain.register(Arc::new(Deaf));
    let mut group = c.benchmark_group("quiesce");
    group.bench_function("enter and leave", |b| {
        b.iter(|| {
            let requests = vcpu.enter();
            vcpu.leave();
            requests
        });
    });
    group.bench_function("request with one vCPU outside", |b| {
        b.iter(|| domain.request_and_wait(Requests::FLUSH_TLB, None));
    });
}

criterion_group!(benches, look_up, change, harvest, accesses, quiesce);
criterion_main!(benches);
