//! Code that nobody wrote: random bytes, and compiled code with random bits flipped, in every mode.
//! Nothing may panic, hang past its kick, or touch what lies outside the memslot.
//!
//! `HOSTILE_SECONDS` sets how long each mode is tried.

use std::time::{Duration, Instant};

use addr::Gpa;
use cpu::{CpuState, Exit, Segment};
use differential::guest::machine::Machine;
use fastrand::Rng;

const RAM: u64 = 1 << 20;
/// Bytes before and behind the memslot, filled with [`CANARY`].
const MARGIN: u64 = 1 << 16;
const CANARY: u8 = 0xa7;
const PML4: u64 = 0x1000;
/// Where the bytes are put.
const CODE: u64 = 0x8000;
/// Looks of the watchdog until a kick.
const TICKS: u32 = 2;
/// A vCPU that has been kicked must leave within this time.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
enum Mode {
    Real,
    Protected16,
    Protected32,
    Compatibility,
    Long,
    LongUser,
}

fn enter(state: &mut CpuState, mode: Mode, rng: &mut Rng) {
    *state = CpuState::default();
    for register in &mut state.gpr {
        *register = rng.u64(..) >> rng.u8(..64);
    }
    state.rip = CODE;
    state.gpr[4] = 0x7f00;
    state.rflags = 2 | rng.u64(..) & 0xed5;
    let long = matches!(mode, Mode::Compatibility | Mode::Long | Mode::LongUser);
    state.cr0 = match mode {
        Mode::Real => 0x10,
        Mode::Protected16 | Mode::Protected32 => 0x33,
        _ => 0x8005_0033,
    };
    if long {
        state.cr3 = PML4;
        state.cr4 = 0x4_06b0;
        state.msrs.efer = 0xd01;
    } else {
        state.cr4 = 0x600;
    }
    state.xcr0 = 7;
    let privilege = if matches!(mode, Mode::LongUser) {
        0x60
    } else {
        0
    };
    let code = privilege
        | match mode {
            Mode::Real | Mode::Protected16 => 0x9b,
            Mode::Protected32 | Mode::Compatibility => 0xc09b,
            Mode::Long | Mode::LongUser => 0xa09b,
        };
    segments(state, mode, code, 0xc093 | privilege);
    state.gdtr.limit = 0xffff;
    state.idtr.limit = 0xffff;
    state.dr6 = 0xffff_0ff0;
    state.dr7 = 0x400;
}

fn segments(state: &mut CpuState, mode: Mode, code: u16, data: u16) {
    let limit = if matches!(mode, Mode::Real | Mode::Protected16) {
        0xffff
    } else {
        0xffff_ffff
    };
    let segment = |selector, attributes| Segment {
        base: 0,
        limit,
        selector,
        attributes,
        unusable: false,
    };
    let rpl = if matches!(mode, Mode::LongUser) { 3 } else { 0 };
    let data = if limit == 0xffff { 0x93 } else { data };
    let all = &mut state.segments;
    all.cs = segment(0x10 | rpl, code);
    let data = segment(0x18 | rpl, data);
    (all.ds, all.es, all.ss, all.fs, all.gs) = (data, data, data, data, data);
    all.tr = segment(0x20, 0x8b);
    all.ldtr.unusable = true;
}

/// The first MiB one to one, for everybody.
fn page_tables(machine: &Machine) {
    let put = |at: u64, value: u64| machine.write(Gpa::new(at), &value.to_le_bytes());
    put(PML4, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x4007);
    for page in 0..RAM >> 12 {
        put(0x4000 + page * 8, page << 12 | 7);
    }
}

fn bytes(rng: &mut Rng) -> Vec<u8> {
    let mut code = vec![0; 256];
    if rng.bool() {
        rng.fill(&mut code);
        return code;
    }
    // This program's own code, a few bits of it flipped.
    let own = include_bytes!("hostile.rs").len();
    let text = std::fs::read("/proc/self/exe").unwrap_or_default();
    let from = (text.len() / 3 + rng.usize(..own)).min(text.len().saturating_sub(256));
    code.copy_from_slice(&text[from..from + 256]);
    for _ in 0..rng.usize(1..8) {
        let at = rng.usize(..code.len());
        code[at] ^= 1 << rng.u8(..8);
    }
    code
}

fn attack(mode: Mode, seed: u64) {
    let seconds = std::env::var("HOSTILE_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(1));
    let mut machine = Machine::with_margin(RAM, MARGIN).unwrap();
    machine.fill_margins(CANARY);
    let watchdog = machine.watchdog(TICKS);
    let mut rng = Rng::with_seed(seed);
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed() < time {
        page_tables(&machine);
        machine.write(Gpa::new(CODE), &bytes(&mut rng));
        enter(machine.vcpu.state_mut(), mode, &mut rng);
        let entered = Instant::now();
        watchdog.start();
        // A few exits of one guest: devices that answer zeros.
        for _ in 0..8 {
            match machine.run() {
                Exit::Io(_) => machine.vcpu.complete_io(&[0; 4]),
                Exit::Mmio(mmio) => machine.vcpu.complete_mmio(&[0; 8][..mmio.len.into()]),
                _ => break,
            }
        }
        watchdog.stop();
        assert!(
            entered.elapsed() < LIMIT,
            "{mode:?}: a kick was not heeded, seed {seed}"
        );
        runs += 1;
    }
    assert!(runs > 3, "{mode:?}: only {runs} runs");
    assert!(
        machine.margins_hold(CANARY),
        "{mode:?}: wrote outside the memslot, seed {seed}"
    );
}

#[test]
fn real_mode() {
    attack(Mode::Real, 1);
}

#[test]
fn protected_mode_16() {
    attack(Mode::Protected16, 2);
}

#[test]
fn protected_mode_32() {
    attack(Mode::Protected32, 3);
}

#[test]
fn compatibility_mode() {
    attack(Mode::Compatibility, 4);
}

#[test]
fn long_mode() {
    attack(Mode::Long, 5);
}

#[test]
fn long_mode_at_cpl_3() {
    attack(Mode::LongUser, 6);
}
