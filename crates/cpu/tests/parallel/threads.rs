//! Runs a program on each of some vCPUs at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cpu::{Exit, Vcpu};
use memory::quiesce::Requests;

use crate::machine::{Bare, CODE, Machine, STACK, long_mode};

/// A program that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// What a vCPU begins with.
pub(super) struct Program<'a> {
    pub(super) code: &'a [u8],
    /// General registers by number.
    pub(super) registers: &'a [(usize, u64)],
}

/// Where the code of the vCPU with this number lies.
pub(super) fn code_of(index: usize) -> u64 {
    CODE + 0x1_0000 * index as u64
}

/// A machine with so many vCPUs; the machine's own one is not among them.
pub(super) fn machine(vcpus: usize) -> (Machine, Vec<Vcpu>) {
    let machine = Machine::new(&[0xf4]);
    let vcpus = (0..vcpus)
        .map(|id| Machine::vcpu(&machine.mmu, &machine.domain, &machine.code, 1 + id as u32))
        .collect();
    (machine, vcpus)
}

/// Runs each program to its `HLT`.
pub(super) fn run(machine: &Machine, vcpus: &mut [Vcpu], programs: &[Program<'_>]) {
    for (index, (vcpu, program)) in vcpus.iter_mut().zip(programs).enumerate() {
        machine.write(code_of(index), program.code);
        let state = vcpu.state_mut();
        long_mode(state);
        state.rip = code_of(index);
        state.gpr[4] = STACK + 0x1000 * index as u64;
        for (register, value) in program.registers {
            state.gpr[*register] = *value;
        }
    }
    let kickers: Vec<_> = vcpus.iter().map(Vcpu::kicker).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let started = Instant::now();
            while !done.load(Ordering::Relaxed) && started.elapsed() < LIMIT {
                thread::sleep(Duration::from_millis(1));
            }
            if !done.load(Ordering::Relaxed) {
                for kicker in kickers {
                    kicker.request(Requests::EXIT);
                }
            }
        });
        let threads: Vec<_> = vcpus
            .iter_mut()
            .map(|vcpu| scope.spawn(|| vcpu.run(&mut Bare::default())))
            .collect();
        let exits: Vec<_> = threads
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        done.store(true, Ordering::Relaxed);
        for (index, exit) in exits.into_iter().enumerate() {
            assert_eq!(exit.expect("no panic"), Exit::Halt, "vCPU {index}");
        }
    });
}
