//! Code that nobody wrote: random bytes, and compiled code with random bits flipped, in every mode.
//! Nothing may panic, hang past its kick, or touch what lies outside the memslot.
//!
//! The guest begins with random registers, page tables that map its memory to everybody, and
//! descriptor tables that are whatever lies at address 0: so nearly every run ends in faults of faults.
//! Bytes around the memslot are filled with a canary. `cargo xtask hostile-code` goes on for as long as one
//! likes; the gate tries each mode for a second.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use addr::Gpa;
use anyhow::{Result, ensure};
use cpu::{CpuState, Exit, Segment};
use fastrand::Rng;

use crate::guest::machine::Machine;
use crate::guest::thread_time::Work;
use crate::guest::watchdog::Watchdog;

const RAM: u64 = 1 << 20;
/// Bytes before and behind the memslot, filled with [`CANARY`].
const MARGIN: u64 = 1 << 16;
const CANARY: u8 = 0xa7;
const PML4: u64 = 0x1000;
/// Where the bytes are put.
const CODE: u64 = 0x8000;
/// Where real mode's faults end.
const STOP: u64 = 0x600;
/// Bytes of code.
const LENGTH: usize = 256;
/// Looks of the watchdog until a kick.
const TICKS: u32 = 2;
/// A vCPU that has been kicked must leave before it has worked for so long.
const LIMIT: Duration = Duration::from_secs(5);
/// Exits of one guest: devices answer whatever comes.
const EXITS: usize = 8;

/// How the bytes are read, and with which rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit real mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// 16-bit protected mode.
    Protected16,
    /// 32-bit protected mode without paging.
    Protected32,
    /// 32-bit code in long mode.
    Compatibility,
    /// 64-bit code at CPL 0.
    Long,
    /// 64-bit code at CPL 3.
    LongUser,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Real,
        Self::Virtual8086,
        Self::Protected16,
        Self::Protected32,
        Self::Compatibility,
        Self::Long,
        Self::LongUser,
    ];

    fn is_16_bit(self) -> bool {
        matches!(self, Self::Real | Self::Virtual8086 | Self::Protected16)
    }

    fn privilege(self) -> u16 {
        if matches!(self, Self::Virtual8086 | Self::LongUser) {
            3
        } else {
            0
        }
    }
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Guests that ran.
    pub runs: u64,
    /// How they ended.
    pub exits: BTreeMap<&'static str, u64>,
    /// The longest that a guest ran, in processor time: the watchdog kicks after 50 ms.
    pub longest: Duration,
}

/// A machine that is given one hostile guest after the other.
pub struct Attack {
    machine: Machine,
    watchdog: Watchdog,
    mode: Mode,
    rng: Rng,
    /// This program's own bytes.
    own: Vec<u8>,
    tally: Tally,
}

impl Attack {
    /// All draws come from the seed.
    pub fn new(mode: Mode, seed: u64) -> Result<Self> {
        let machine = Machine::with_margin(RAM, MARGIN)?;
        machine.fill_margins(CANARY);
        Ok(Self {
            watchdog: machine.watchdog(TICKS),
            machine,
            mode,
            rng: Rng::with_seed(seed),
            own: std::fs::read("/proc/self/exe").unwrap_or_default(),
            tally: Tally::default(),
        })
    }

    /// Runs guests for a while. Fails where a kick was not heeded or memory outside was written.
    pub fn run(&mut self, time: Duration) -> Result<&Tally> {
        let started = Instant::now();
        while started.elapsed() < time {
            self.one()?;
        }
        ensure!(
            self.machine.margins_hold(CANARY),
            "{:?}: wrote outside the memslot",
            self.mode
        );
        Ok(&self.tally)
    }

    fn one(&mut self) -> Result<()> {
        page_tables(&self.machine);
        if self.mode == Mode::Real {
            vectors(&self.machine);
        }
        let bytes = self.bytes();
        self.machine.write(Gpa::new(CODE), &bytes);
        enter(self.machine.vcpu.state_mut(), self.mode, &mut self.rng);
        let work = Work::begin();
        self.watchdog.start();
        let name = self.run_guest();
        self.watchdog.stop();
        let time = work.so_far();
        self.tally.runs += 1;
        *self.tally.exits.entry(name).or_default() += 1;
        self.tally.longest = self.tally.longest.max(time);
        ensure!(
            time < LIMIT,
            "{:?}: a kick was not heeded for {time:?}; the code: {bytes:02x?}",
            self.mode
        );
        Ok(())
    }

    fn run_guest(&mut self) -> &'static str {
        let mut name = "";
        for _ in 0..EXITS {
            let exit = self.machine.run();
            name = name_of(&exit);
            let answer = self.rng.u64(..).to_le_bytes();
            let vcpu = &mut self.machine.vcpu;
            match exit {
                Exit::Io(_) => vcpu.complete_io(&answer[..4]),
                Exit::Mmio(mmio) => vcpu.complete_mmio(&answer[..mmio.len.into()]),
                _ => break,
            }
        }
        name
    }

    fn bytes(&mut self) -> Vec<u8> {
        let rng = &mut self.rng;
        let mut code = vec![0; LENGTH];
        let last = self.own.len().saturating_sub(LENGTH);
        if last == 0 || rng.bool() {
            rng.fill(&mut code);
            return code;
        }
        // Compiled code, a few bits of it flipped. It lies in the middle of the file.
        let from = last / 8 + rng.usize(..last / 2);
        code.copy_from_slice(&self.own[from..from + LENGTH]);
        for _ in 0..rng.usize(..8) {
            let at = rng.usize(..code.len());
            code[at] ^= 1 << rng.u8(..8);
        }
        code
    }
}

fn name_of(exit: &Exit) -> &'static str {
    match exit {
        Exit::Io(_) => "I/O",
        Exit::Mmio(_) => "MMIO",
        Exit::Halt => "halt",
        Exit::Shutdown => "triple fault",
        Exit::Interrupted => "kick",
        Exit::InternalError(_) => "internal error",
        Exit::HostFault(_) => "host fault",
        Exit::Debug(_) => "debug",
        _ => "other",
    }
}

fn enter(state: &mut CpuState, mode: Mode, rng: &mut Rng) {
    *state = CpuState::default();
    for register in &mut state.gpr {
        *register = rng.u64(..) >> rng.u8(..64);
    }
    state.rip = CODE;
    state.gpr[4] = 0x7f00;
    state.rflags = 2 | rng.u64(..) & 0xed5;
    if mode == Mode::Virtual8086 {
        state.rflags |= 0x2_0000;
    }
    let long = matches!(mode, Mode::Compatibility | Mode::Long | Mode::LongUser);
    state.cr0 = match mode {
        Mode::Real => 0x10,
        Mode::Virtual8086 | Mode::Protected16 | Mode::Protected32 => 0x33,
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
    let privilege = mode.privilege() << 5;
    let code = privilege
        | match mode {
            Mode::Virtual8086 => 0x93,
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
    let limit = if mode.is_16_bit() {
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
    let rpl = mode.privilege();
    let data = if limit == 0xffff {
        0x93 | rpl << 5
    } else {
        data
    };
    let all = &mut state.segments;
    let mut cs = segment(0x10 | rpl, code);
    let mut data = segment(0x18 | rpl, data);
    if mode == Mode::Virtual8086 {
        (cs.selector, data.selector) = (0, 0);
    }
    all.cs = cs;
    (all.ds, all.es, all.ss, all.fs, all.gs) = (data, data, data, data, data);
    all.tr = segment(0x20, 0x8b);
    all.ldtr.unusable = true;
}

/// Real mode's vectors lead to a `HLT`: without them every fault begins an endless tour of zeros.
fn vectors(machine: &Machine) {
    for vector in 0..256 {
        machine.write(Gpa::new(4 * vector), &(STOP as u32).to_le_bytes());
    }
    machine.write(Gpa::new(STOP), &[0xf4]);
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
