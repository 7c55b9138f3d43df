//! What the monitor does to vCPUs that run: slots that come and go, kicks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use addr::{Address, Gpa};
use cpu::Exit;
use memory::quiesce::Requests;
use memory::slot::Region;

use super::threads;
use crate::machine::{Bare, CODE, DATA, Machine, long_mode};

/// Guest physical address of a slot of its own, and where its memory is among the machine's RAM.
const SLOT: u64 = 0x2000_0000;
const BEHIND: [u64; 2] = [0xa0_0000, 0xb0_0000];

fn set(machine: &Machine, behind: Option<u64>) {
    let region = Region {
        slot: 1,
        flags: 0,
        gpa: Gpa::new(SLOT),
        size: if behind.is_some() { 4096 } else { 0 },
        hva: machine.ram.hva().wrapping_add(behind.unwrap_or(0)),
    };
    machine.slots.set_region(&region).expect("a slot");
}

/// When a slot is gone, no vCPU writes to its memory any more.
#[test]
fn slots_that_come_and_go_under_load() {
    let (machine, mut vcpus) = threads::machine(2);
    // l: incq (%rdi); jmp l
    machine.write(CODE, &[0x48, 0xff, 0x07, 0xeb, 0xfb]);
    set(&machine, Some(BEHIND[0]));
    let stop = AtomicBool::new(false);
    let kickers: Vec<_> = vcpus.iter().map(cpu::Vcpu::kicker).collect();
    thread::scope(|scope| {
        for (index, vcpu) in vcpus.iter_mut().enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                long_mode(vcpu.state_mut());
                vcpu.state_mut().gpr[7] = SLOT + 64 * index as u64;
                while !stop.load(Ordering::Relaxed) {
                    match vcpu.run(&mut Bare::default()) {
                        Exit::Mmio(_) => vcpu.complete_mmio(&[0; 8]),
                        Exit::Interrupted => {}
                        exit => panic!("{exit:?}"),
                    }
                }
            });
        }
        let words = |behind| [0, 64].map(|at| machine.word(behind + at));
        for round in 1..=300 {
            let (old, new) = (BEHIND[(round + 1) % 2], BEHIND[round % 2]);
            set(&machine, None);
            let before = words(old);
            thread::sleep(Duration::from_micros(200));
            assert_eq!(
                words(old),
                before,
                "round {round}: a slot that was gone was written"
            );
            set(&machine, Some(new));
            let began = words(new);
            for _ in 0..2000 {
                if words(new) != began {
                    break;
                }
                thread::sleep(Duration::from_micros(100));
            }
            assert_ne!(
                words(new),
                began,
                "round {round}: the new slot was never written"
            );
        }
        stop.store(true, Ordering::Relaxed);
        for kicker in kickers {
            kicker.request(Requests::EXIT);
        }
    });
}

/// Thousands of kicks, each heeded, and none leaves an instruction half done.
#[test]
fn kicks_without_end() {
    const KICKS: u64 = 5000;
    // l: inc %rax; mov %rax,(%rdi); jmp l
    let code = [0x48, 0xff, 0xc0, 0x48, 0x89, 0x07, 0xeb, 0xf8];
    let mut machine = Machine::new(&code);
    machine.vcpu.state_mut().gpr[7] = DATA;
    let kicker = machine.vcpu.kicker();
    let (begun, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                let now = begun.load(Ordering::Relaxed);
                if now == seen {
                    std::hint::spin_loop();
                    continue;
                }
                seen = now;
                kicker.request(Requests::EXIT);
            }
        });
        for _ in 0..KICKS {
            begun.fetch_add(1, Ordering::Relaxed);
            assert_eq!(machine.run(), Exit::Interrupted);
            let (rip, rax) = (machine.vcpu.state().rip, machine.vcpu.state().gpr[0]);
            let stored = machine.word(DATA);
            let behind = u64::from(rip == CODE + 3);
            assert_eq!(stored + behind, rax, "at {rip:#x}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(machine.word(DATA) > 0);
}
