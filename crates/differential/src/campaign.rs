//! A run through the catalogue: draws, runs on both sides, compares, counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use iced_x86::{Code, Register};

use crate::case::{Batch, Mode, Outcome};
use crate::compare::Difference;
use crate::generate::{Catalogue, Exclusion, Form, Tolerance, block, single, values};
use crate::layout::DATA_BYTES;
use crate::minimise::{Failure, Pair};
use crate::report::{self, Divergence};

/// How much to do.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Where all draws come from.
    pub seed: u64,
    /// Encodings drawn of each form in each round.
    pub encodings: usize,
    /// States drawn for each encoding.
    pub states: usize,
    /// Rounds go on until the time is over; there is always one.
    pub time: Duration,
    /// So many divergences are made small and kept; further ones are counted.
    pub kept: usize,
    /// Whether divergences are printed as soon as they are found.
    pub progress: Progress,
}

/// See [`Effort::progress`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Printed at once, to standard error.
    Shown,
    /// Only collected.
    Quiet,
}

/// What came of it.
#[derive(Default)]
pub struct Tally {
    /// Cases that ran.
    pub cases: u64,
    /// Cases that the oracle itself didn't bring to an end, by form.
    pub incomparable: BTreeMap<String, u64>,
    /// Cases by the vector that ended them natively.
    pub endings: BTreeMap<u32, u64>,
    /// Divergences by form.
    pub diverging: BTreeMap<String, u64>,
    /// The first of them, minimised.
    pub divergences: Vec<Divergence>,
    /// Rounds through the catalogue.
    pub rounds: u64,
}

/// Programs of one batch.
const PROGRAMS: usize = 32;

/// Runs single instructions of every form in the catalogue.
pub fn single_instructions(
    catalogue: &mut Catalogue,
    effort: Effort,
    pair: &mut Pair<'_>,
) -> Result<Tally> {
    let started = Instant::now();
    let mut tally = Tally::default();
    let mut seen = BTreeMap::new();
    while tally.rounds == 0 || started.elapsed() < effort.time {
        round(catalogue, effort, pair, &mut tally, &mut seen)?;
        tally.rounds += 1;
    }
    drop_unknown(catalogue, &seen);
    Ok(tally)
}

/// Whether a form was ever anything but `#UD`, or could not be encoded at all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    NoEncoding,
    Undefined,
    Works,
}

type SeenForms = BTreeMap<u32, (Code, Seen)>;

fn round(
    catalogue: &Catalogue,
    effort: Effort,
    pair: &mut Pair<'_>,
    tally: &mut Tally,
    seen: &mut SeenForms,
) -> Result<()> {
    let mut drawn = Drawn::new(effort.seed);
    for form in &catalogue.forms {
        seen.entry(form.code as u32)
            .or_insert((form.code, Seen::NoEncoding));
        for encoding in 0..effort.encodings {
            let seed = seed_of(effort.seed, form.code, tally.rounds, encoding);
            drawn.add(*form, seed, effort.states);
            if drawn.batch.programs.len() == PROGRAMS {
                drawn.finish(pair, effort, tally, seen)?;
                drawn = Drawn::new(seed);
            }
        }
    }
    drawn.finish(pair, effort, tally, seen)
}

/// Runs whole programs drawn from the catalogue.
pub fn blocks(
    catalogue: &Catalogue,
    mode: Mode,
    effort: Effort,
    pair: &mut Pair<'_>,
) -> Result<Tally> {
    let started = Instant::now();
    let forms = block::Forms::new(catalogue, mode);
    let mut tally = Tally::default();
    while tally.rounds == 0 || started.elapsed() < effort.time {
        for chunk in 0..effort.encodings {
            let seed = block_seed(effort.seed, tally.rounds, chunk);
            block_batch(&forms, seed, effort, pair, &mut tally)?;
        }
        tally.rounds += 1;
    }
    Ok(tally)
}

fn block_seed(seed: u64, round: u64, chunk: usize) -> u64 {
    let seed = Rng::with_seed(seed).u64(..);
    Rng::with_seed(seed ^ round << 32 ^ chunk as u64).u64(..)
}

fn block_batch(
    forms: &block::Forms,
    seed: u64,
    effort: Effort,
    pair: &mut Pair<'_>,
    tally: &mut Tally,
) -> Result<()> {
    let mut rng = Rng::with_seed(seed);
    let mut batch = Batch {
        pattern: pattern(seed),
        programs: Vec::new(),
        cases: Vec::new(),
    };
    for _ in 0..PROGRAMS {
        let index = batch.programs.len() as u32;
        if let Some((program, cases)) = block::draw(forms, index, effort.states, &mut rng) {
            batch.programs.push(program);
            batch.cases.extend(cases);
        }
    }
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    pair.native.run(&batch, &mut expected)?;
    pair.subject.run(&batch, &mut found)?;
    for (index, (e, f)) in expected.iter().zip(&found).enumerate() {
        tally.count("block", e);
        if !e.ending.is_exception() {
            continue;
        }
        let differences = pair.compare(batch.program(index), e, f, Tolerance::default());
        if !differences.is_empty() {
            block_diverged(&batch, index, differences, seed, effort, pair, tally)?;
        }
    }
    Ok(())
}

fn block_diverged(
    batch: &Batch,
    index: usize,
    differences: Vec<Difference>,
    seed: u64,
    effort: Effort,
    pair: &mut Pair<'_>,
    tally: &mut Tally,
) -> Result<()> {
    if tally.divergences.len() >= effort.kept {
        *tally.diverging.entry("further blocks".into()).or_default() += 1;
        return Ok(());
    }
    let failure = Failure {
        program: *batch.program(index),
        case: batch.cases[index],
        pattern: batch.pattern.clone(),
        tolerance: Tolerance::default(),
    };
    let mut divergence = divergence(pair, failure, differences, String::new(), seed)?;
    divergence.name = report::forms(&divergence.program).join(" ");
    let count = tally.diverging.entry(divergence.name.clone()).or_default();
    *count += 1;
    if *count == 1 {
        tally.divergences.push(divergence);
    }
    Ok(())
}

/// One form can be drawn again without the others.
fn seed_of(seed: u64, code: Code, round: u64, encoding: usize) -> u64 {
    let seed = Rng::with_seed(seed).u64(..);
    let mut rng = Rng::with_seed(seed ^ (code as u64) << 40 ^ round << 16 ^ encoding as u64);
    rng.u64(..)
}

/// A batch, and where its parts come from.
struct Drawn {
    batch: Batch,
    /// Form, tolerance and seed of each program.
    origins: Vec<(Form, Tolerance, u64)>,
}

impl Drawn {
    fn new(seed: u64) -> Self {
        Self {
            batch: Batch {
                pattern: pattern(seed),
                programs: Vec::new(),
                cases: Vec::new(),
            },
            origins: Vec::new(),
        }
    }

    fn add(&mut self, form: Form, seed: u64, states: usize) {
        let mut rng = Rng::with_seed(seed);
        let Some((program, encoded)) = single::program(form, &mut rng) else {
            return;
        };
        let mut tolerance = form.tolerance;
        if tolerance.first_operand {
            let register = encoded.instruction.op0_register().full_register();
            tolerance.gprs |= 1 << (register as u32 - Register::RAX as u32);
        }
        let index = self.batch.programs.len() as u32;
        self.batch.programs.push(program);
        self.origins.push((form, tolerance, seed));
        for _ in 0..states {
            let case = single::case(form.mode, index, &encoded.instruction, &mut rng);
            self.batch.cases.push(case);
        }
    }

    fn finish(
        &self,
        pair: &mut Pair<'_>,
        effort: Effort,
        tally: &mut Tally,
        seen: &mut SeenForms,
    ) -> Result<()> {
        let (mut expected, mut found) = (Vec::new(), Vec::new());
        pair.native.run(&self.batch, &mut expected)?;
        pair.subject.run(&self.batch, &mut found)?;
        for (index, (e, f)) in expected.iter().zip(&found).enumerate() {
            let (form, tolerance, _) = self.origins[self.batch.cases[index].program as usize];
            note(seen, form.code, e);
            tally.count(&format!("{:?}", form.code), e);
            if !e.ending.is_exception() {
                continue;
            }
            let differences = pair.compare(self.batch.program(index), e, f, tolerance);
            if !differences.is_empty() {
                self.diverged(index, differences, pair, effort, tally)?;
            }
        }
        Ok(())
    }

    fn diverged(
        &self,
        index: usize,
        differences: Vec<Difference>,
        pair: &mut Pair<'_>,
        effort: Effort,
        tally: &mut Tally,
    ) -> Result<()> {
        let case = self.batch.cases[index];
        let (form, tolerance, seed) = self.origins[case.program as usize];
        let name = format!("{:?}", form.code);
        let count = tally.diverging.entry(name.clone()).or_default();
        *count += 1;
        if *count > 1 || tally.divergences.len() >= effort.kept {
            return Ok(());
        }
        let failure = Failure {
            program: *self.batch.program(index),
            case,
            pattern: self.batch.pattern.clone(),
            tolerance,
        };
        tally
            .divergences
            .push(divergence(pair, failure, differences, name, seed)?);
        Ok(())
    }
}

/// Minimises, and runs a last time for what to print. What does not come back is printed as it was at
/// `first`.
fn divergence(
    pair: &mut Pair<'_>,
    failure: Failure,
    first: Vec<Difference>,
    name: String,
    seed: u64,
) -> Result<Divergence> {
    let small = pair.minimise(failure)?;
    pair.subject.remarks();
    let (mut differences, expected) = pair.run(&small)?;
    let mut remarks = pair.subject.remarks();
    if differences.is_empty() {
        differences = first;
        remarks.push("found once; not when it was run again alone".into());
    }
    Ok(Divergence {
        name,
        seed,
        program: small.program,
        case: small.case,
        differences,
        expected,
        remarks,
    })
}

fn note(seen: &mut SeenForms, code: Code, outcome: &Outcome) {
    let now = if outcome.ending.vector == 6 {
        Seen::Undefined
    } else {
        Seen::Works
    };
    seen.entry(code as u32)
        .and_modify(|(_, before)| {
            if *before != Seen::Works {
                *before = now;
            }
        })
        .or_insert((code, now));
}

/// The oracle says itself what it has.
fn drop_unknown(catalogue: &mut Catalogue, seen: &SeenForms) {
    for (code, seen) in seen.values() {
        match seen {
            Seen::NoEncoding => catalogue.exclude(*code, Exclusion::NoEncoder),
            Seen::Undefined => catalogue.exclude(*code, Exclusion::HostLacksIt),
            Seen::Works => {}
        }
    }
}

impl Tally {
    fn count(&mut self, name: &str, outcome: &Outcome) {
        self.cases += 1;
        *self.endings.entry(outcome.ending.vector).or_default() += 1;
        if !outcome.ending.is_exception() {
            *self.incomparable.entry(name.to_owned()).or_default() += 1;
        }
    }
}

/// What fills the data of a batch.
fn pattern(seed: u64) -> Box<[u8; DATA_BYTES]> {
    let mut rng = Rng::with_seed(seed);
    let mut pattern = Box::new([0; DATA_BYTES]);
    for chunk in pattern.chunks_mut(64) {
        values::fill(&mut rng, chunk);
    }
    pattern
}

/// The modes in which user code can run.
pub const MODES: [Mode; 3] = [Mode::Long, Mode::Compat32, Mode::Compat16];
