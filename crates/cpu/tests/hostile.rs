//! Random bytes as code, in every mode: no panic, no hang past a kick, and nothing of the host's is
//! touched. `HOSTILE_SECONDS` lets it go on for longer, `HOSTILE_SEED` draws others.

mod machine;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cpu::{CpuState, Exit};
use fastrand::Rng;
use machine::{CODE, DATA, Machine, STACK, long_mode, protected_mode};
use memory::quiesce::Requests;

fn real_mode(state: &mut CpuState) {
    protected_mode(state);
    state.cr0 = 0x10;
    state.rip = 0x100;
    state.gpr[4] = 0xfffe;
    let s = &mut state.segments;
    for segment in [
        &mut s.cs, &mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs,
    ] {
        segment.selector = 0x7000;
        segment.base = 0x7_0000;
        segment.limit = 0xffff;
        segment.attributes = 0x93;
    }
}

fn round(machine: &mut Machine, draw: &mut Rng, mode: usize) {
    let bytes: Vec<u8> = (0..256).map(|_| draw.u8(..)).collect();
    let state = machine.vcpu.state_mut();
    *state = CpuState::default();
    let at = match mode {
        0 => {
            long_mode(state);
            CODE
        }
        1 => {
            protected_mode(state);
            CODE
        }
        _ => {
            real_mode(state);
            0x7_0100
        }
    };
    for register in &mut state.gpr {
        *register = match draw.u8(..3) {
            0 => DATA + draw.u64(..0x2000),
            1 => draw.u64(..16),
            _ => draw.u64(..),
        };
    }
    state.gpr[4] = if mode == 2 { 0xfffe } else { STACK };
    machine.write(at, &bytes);
    for _ in 0..20 {
        match machine.run() {
            Exit::Mmio(mmio) => {
                let answer = if mmio.write.is_some() {
                    0
                } else {
                    usize::from(mmio.len)
                };
                machine.vcpu.complete_mmio(&[0x5a; 8][..answer]);
            }
            Exit::Io(io) => {
                let length = usize::from(io.size) * io.count as usize;
                machine.vcpu.complete_io(&vec![0x5a; length]);
            }
            Exit::Msr(_) => machine.vcpu.complete_msr(Some(0)),
            _ => break,
        }
    }
}

#[test]
fn random_bytes() {
    let seconds = std::env::var("HOSTILE_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(4);
    let mut machine = Machine::new(&[0xf4]);
    let kicker = machine.vcpu.kicker();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let kicks = thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
            kicker.request(Requests::EXIT);
        }
    });
    let seed = std::env::var("HOSTILE_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let mut draw = Rng::with_seed(seed.unwrap_or(0x1234_5678_9abc_def1));
    let started = Instant::now();
    let mut rounds = 0;
    while started.elapsed() < Duration::from_secs(seconds) {
        round(&mut machine, &mut draw, rounds % 3);
        rounds += 1;
    }
    stop.store(true, Ordering::Relaxed);
    kicks.join().unwrap();
    assert!(rounds > 100, "only {rounds} rounds");
    println!("{rounds} rounds");
}
