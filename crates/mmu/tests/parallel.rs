//! Several vCPUs at once, and a monitor that changes the ground under them.
//!
//! Each CPU here keeps translations until it is told to drop them, so whatever the MMU forgets to
//! take away is used.

mod machine;
mod model;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use addr::{Address, Gpa};
use machine::cpu::Cpu;
use machine::{Machine, PATHS, long_mode};
use memory::access as host;
use memory::slot::SlotFlags;
use mmu::{Fault, PagingPath};
use model::ops::Random;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const RW: u64 = 3;
const CPUS: u64 = 2;

/// Slot 0: the first 4 MiB. Slot 1: the 2 MiB behind it.
fn machine(path: PagingPath) -> Machine {
    let machine = Machine::without_slots(path, 6 * MIB);
    let none = SlotFlags::empty();
    machine.slot(0, Gpa::new(0), 0, 4 * MIB, none).unwrap();
    machine
        .slot(1, Gpa::new(4 * MIB), 4 * MIB, 2 * MIB, none)
        .unwrap();
    // 4-level tables that map the first 6 MiB one to one, by 4 KiB pages.
    machine.poke(0x1000, 0x2000 | RW);
    machine.poke(0x2000, 0x3000 | RW);
    for table in 0..3 {
        machine.poke(0x3000 + table * 8, (0x4000 + table * PAGE) | RW);
        for entry in 0..512 {
            let page = (table * 512 + entry) * PAGE;
            machine.poke(0x4000 + table * PAGE + entry * 8, page | RW);
        }
    }
    machine
}

/// Runs `guest` on each CPU until `monitor` returns.
fn run<T>(
    machine: &Machine,
    guest: impl Fn(&mut Cpu, &mut Random, u64) + Sync,
    monitor: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    let ready = Barrier::new(CPUS as usize + 1);
    thread::scope(|scope| {
        for id in 0..CPUS {
            let (stop, ready, guest) = (&stop, &ready, &guest);
            scope.spawn(move || {
                let mut cpu = Cpu::new(&machine.mmu, &machine.domain, id as u32);
                let mut random = Random::new(id);
                cpu.load_registers_outside(&long_mode(0x1000));
                ready.wait();
                while !stop.load(Ordering::Relaxed) {
                    cpu.enter();
                    for _ in 0..50 {
                        guest(&mut cpu, &mut random, id);
                        cpu.poll();
                    }
                    cpu.leave();
                }
            });
        }
        ready.wait();
        let result = monitor();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn region(machine: &Machine, from: u64, bytes: u64) -> Vec<u8> {
    let mut copy = vec![0; bytes as usize];
    host::read(machine.host(from), &mut copy).unwrap();
    copy
}

/// Once the call that deletes a slot has returned, nobody writes there any more.
#[test]
fn no_write_reaches_a_deleted_slot() {
    for path in PATHS {
        let machine = machine(path);
        let write_anywhere = |cpu: &mut Cpu, random: &mut Random, id: u64| {
            let gva = 4 * MIB + random.below(512) * PAGE + id * 8;
            match cpu.store(gva, random.next()) {
                Ok(()) | Err(Fault::Mmio { .. }) => {}
                Err(fault) => panic!("{fault:x?}"),
            }
        };
        run(&machine, write_anywhere, || {
            for _ in 0..60 {
                let slot = |bytes| {
                    let gpa = Gpa::new(4 * MIB);
                    machine
                        .slot(1, gpa, 4 * MIB, bytes, SlotFlags::empty())
                        .unwrap();
                };
                slot(0);
                let before = region(&machine, 4 * MIB, 2 * MIB);
                thread::yield_now();
                let after = region(&machine, 4 * MIB, 2 * MIB);
                assert!(before == after, "{path:?}: a write after the slot was gone");
                slot(2 * MIB);
                thread::yield_now();
            }
        });
        machine.mmu.check_invariants().unwrap();
    }
}

/// A migration: copy everything, then again and again what the log says, at last with the guest
/// stopped. The copy equals the source.
#[test]
fn the_dirty_log_loses_no_page() {
    for path in PATHS {
        let machine = machine(path);
        let write_data = |cpu: &mut Cpu, random: &mut Random, id: u64| {
            let gva = MIB + random.below(768) * PAGE + id * 8;
            cpu.store(gva, random.next()).unwrap();
        };
        let mut copy = vec![0; 4 * MIB as usize];
        let log = |flags| machine.slot(0, Gpa::new(0), 0, 4 * MIB, flags).unwrap();
        run(&machine, write_data, || {
            log(SlotFlags::LOG_DIRTY_PAGES);
            copy = region(&machine, 0, 4 * MIB);
            for _ in 0..40 {
                copy_dirty(&machine, &mut copy);
                thread::yield_now();
            }
        });
        let last = copy_dirty(&machine, &mut copy);
        assert!(last > 0, "the guest was writing");
        let differs = copy
            .iter()
            .zip(region(&machine, 0, 4 * MIB))
            .position(|(a, b)| *a != b);
        assert_eq!(differs, None, "{path:?}");
        log(SlotFlags::empty());
        machine.mmu.check_invariants().unwrap();
    }
}

/// Copies what the dirty log reports; returns how many pages.
fn copy_dirty(machine: &Machine, copy: &mut [u8]) -> usize {
    let words = machine.slots.harvest(0).unwrap();
    let mut pages = 0;
    for page in 0..words.len() as u64 * 64 {
        if words[page as usize / 64] >> (page % 64) & 1 == 1 {
            let at = (page * PAGE) as usize;
            copy[at..at + PAGE as usize].copy_from_slice(&region(machine, page * PAGE, PAGE));
            pages += 1;
        }
    }
    pages
}

/// Each CPU edits a page table of its own by stores through its own mapping, invalidates the one
/// page, and looks: it must see the page that it has just mapped. Meanwhile logging goes on and off,
/// and flushes protect and unprotect the tables.
#[test]
fn a_guest_that_edits_its_tables_sees_its_edits() {
    for path in PATHS {
        let machine = machine(path);
        // Data pages say their own number.
        for page in 256..768 {
            machine.poke(page * PAGE, page);
        }
        // Each CPU has a window of 512 pages, mapped by a table of its own.
        for id in 0..CPUS {
            machine.poke(0x3000 + (8 + id) * 8, table_of(id) | RW);
        }
        let edit = |cpu: &mut Cpu, random: &mut Random, id: u64| {
            let window = (8 + id) * 2 * MIB;
            let index = random.below(64);
            let page = 256 + random.below(512);
            cpu.store(table_of(id) + index * 8, (page * PAGE) | RW)
                .unwrap();
            cpu.invlpg(window + index * PAGE);
            assert_eq!(cpu.load(window + index * PAGE), Ok(page), "{path:?}");
            match random.below(40) {
                0 => cpu.flush(),
                // Quiet for some flushes: the table becomes protected.
                1 => (0..5).for_each(|_| cpu.flush()),
                _ => {}
            }
        };
        run(&machine, edit, || {
            for round in 0..40 {
                let flags = if round % 2 == 0 {
                    SlotFlags::LOG_DIRTY_PAGES
                } else {
                    SlotFlags::empty()
                };
                machine.slot(0, Gpa::new(0), 0, 4 * MIB, flags).unwrap();
                let _ = machine.slots.harvest(0);
                thread::yield_now();
            }
        });
        machine.mmu.check_invariants().unwrap();
        if path == PagingPath::Shadow {
            let stats = machine.mmu.shadow_stats();
            assert!(
                stats.mmu_pte_write > 0,
                "tables were protected and written: {stats:?}"
            );
        }
    }
}

fn table_of(id: u64) -> u64 {
    0x10_000 + id * PAGE
}

/// All CPUs fault on the same pages at the same time: each is installed once.
#[test]
fn faults_in_parallel_install_once() {
    for path in PATHS {
        let machine = machine(path);
        let log = SlotFlags::LOG_DIRTY_PAGES;
        machine.slot(0, Gpa::new(0), 0, 4 * MIB, log).unwrap();
        let ready = Barrier::new(CPUS as usize);
        thread::scope(|scope| {
            for id in 0..CPUS {
                let (machine, ready) = (&machine, &ready);
                scope.spawn(move || {
                    let mut cpu = Cpu::new(&machine.mmu, &machine.domain, id as u32);
                    cpu.load_registers_outside(&long_mode(0x1000));
                    ready.wait();
                    cpu.enter();
                    for page in 256..1024 {
                        let at = cpu.for_write(page * PAGE).unwrap();
                        assert_eq!(at, machine.host(0).wrapping_add(page * PAGE));
                    }
                    cpu.leave();
                });
            }
        });
        machine.mmu.check_invariants().unwrap();
        let dirty: u32 = machine
            .slots
            .harvest(0)
            .unwrap()
            .iter()
            .map(|w| w.count_ones())
            .sum();
        assert!(dirty >= 768, "{path:?}: {dirty} pages");
        if path == PagingPath::Nested {
            assert!(machine.mmu.pages()[0] >= 768);
        }
    }
}
