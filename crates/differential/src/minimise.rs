//! Makes a failing case small: takes away whatever is not needed for the two sides to differ.

use std::time::{Duration, Instant};

use anyhow::Result;
use iced_x86::{Decoder, DecoderOptions};

use crate::case::{Batch, Case, Executor, Outcome, Program, State};
use crate::compare::{Difference, compare};
use crate::generate::Tolerance;
use crate::layout::DATA_BYTES;

/// A case that takes long on one side (it hangs) is printed as it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// The two sides of a comparison.
pub struct Pair<'a> {
    /// The oracle.
    pub native: &'a mut dyn Executor,
    /// The side under test.
    pub subject: &'a mut dyn Executor,
}

/// What is being made small.
#[derive(Clone)]
pub struct Failure {
    /// The program.
    pub program: Program,
    /// The state.
    pub case: Case,
    /// What fills the data.
    pub pattern: Box<[u8; DATA_BYTES]>,
    /// What is not compared.
    pub tolerance: Tolerance,
}

impl Pair<'_> {
    /// Runs one case on both sides; what differs, and the oracle's outcome.
    pub fn run(&mut self, failure: &Failure) -> Result<(Vec<Difference>, Outcome)> {
        let mut case = failure.case;
        case.program = 0;
        let batch = Batch {
            pattern: failure.pattern.clone(),
            programs: vec![failure.program],
            cases: vec![case],
        };
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        self.native.run(&batch, &mut expected)?;
        self.subject.run(&batch, &mut found)?;
        if !expected[0].ending.is_exception() {
            // Not an end to compare with: made small it would be another case.
            return Ok((Vec::new(), expected[0]));
        }
        let differences = compare(&expected[0], &found[0], failure.tolerance);
        Ok((differences, expected[0]))
    }

    /// Simplifies as long as the sides differ.
    pub fn minimise(&mut self, mut failure: Failure) -> Result<Failure> {
        let started = Instant::now();
        for simplify in simplifications(&failure.program) {
            if started.elapsed() > PATIENCE {
                break;
            }
            let mut simpler = failure.clone();
            simplify.apply(&mut simpler);
            if !self.run(&simpler)?.0.is_empty() {
                failure = simpler;
            }
        }
        Ok(failure)
    }
}

/// One thing less.
enum Simplification {
    Instruction { at: usize, len: usize },
    Gpr(usize),
    Flags(u64),
    Ymm(usize),
    St(usize),
    X87,
    Mxcsr,
    Bases,
    Patch(usize),
    Pattern,
}

impl Simplification {
    fn apply(&self, failure: &mut Failure) {
        let plain = State::initial();
        let state = &mut failure.case.state;
        match *self {
            Self::Instruction { at, len } => failure.program.bytes[at..at + len].fill(0x90),
            Self::Gpr(index) => state.gpr[index] = 0,
            Self::Flags(mask) => state.rflags &= !mask,
            Self::Ymm(index) => state.extended.set_ymm(index, &[0; 32]),
            Self::St(index) => state.extended.st_mut(index).fill(0),
            Self::X87 => state.extended.0[..24].copy_from_slice(&plain.extended.0[..24]),
            Self::Mxcsr => state.extended.set_mxcsr(plain.extended.mxcsr()),
            Self::Bases => (state.fs_base, state.gs_base) = (0, 0),
            Self::Patch(index) => failure.case.patches[index].len = 0,
            Self::Pattern => failure.pattern.fill(0),
        }
    }
}

fn simplifications(program: &Program) -> Vec<Simplification> {
    let mut list = Vec::new();
    let options = DecoderOptions::NONE;
    let decoder = Decoder::with_ip(
        program.mode.bitness(),
        program.code(),
        program.entry(),
        options,
    );
    for instruction in decoder {
        list.push(Simplification::Instruction {
            at: (instruction.ip() - program.entry()) as usize,
            len: instruction.len(),
        });
    }
    list.push(Simplification::Mxcsr);
    list.push(Simplification::X87);
    list.push(Simplification::Pattern);
    list.push(Simplification::Bases);
    list.extend([0x8d5, 0x400, 0x100, 1, 4, 0x10, 0x40, 0x80, 0x800].map(Simplification::Flags));
    list.extend((0..3).map(Simplification::Patch));
    list.extend((0..16).map(Simplification::Gpr));
    list.extend((0..16).map(Simplification::Ymm));
    list.extend((0..8).map(Simplification::St));
    list
}
