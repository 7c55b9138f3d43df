//! A run through the catalogue: draws, runs on both sides, compares, counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use fastrand::Rng;
use iced_x86::{Code, Register};

use crate::case::{Batch, Mode, Outcome};
use crate::compare::compare;
use crate::generate::{Catalogue, Exclusion, Form, Tolerance, block, single, values};
use crate::layout::DATA_BYTES;
use crate::minimise::Pair;
use crate::report::{Divergence, Name};
use crate::steady::{Sighting, Verdict};

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
    /// The first of them.
    pub divergences: Vec<Divergence>,
    /// Cases of which the host gave two results, by form: see [`crate::steady`].
    pub unsteady: BTreeMap<String, u64>,
    /// The first of these.
    pub unsteadies: Vec<Divergence>,
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
        let differences = compare(e, f, Tolerance::default());
        if !differences.is_empty() {
            let sighting = Sighting {
                batch: &batch,
                index,
                tolerance: Tolerance::default(),
                expected: e,
                found: f,
                differences,
            };
            tally.diverged(&sighting, Name::Program, seed, effort, pair)?;
        }
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
            let (form, tolerance, seed) = self.origins[self.batch.cases[index].program as usize];
            note(seen, form.code, e);
            tally.count(&format!("{:?}", form.code), e);
            if !e.ending.is_exception() {
                continue;
            }
            let differences = compare(e, f, tolerance);
            if !differences.is_empty() {
                let sighting = Sighting {
                    batch: &self.batch,
                    index,
                    tolerance,
                    expected: e,
                    found: f,
                    differences,
                };
                let name = Name::Form(form.code);
                tally.diverged(&sighting, name, seed, effort, pair)?;
            }
        }
        Ok(())
    }
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

/// So many divergences of one form are looked into.
const OF_ONE_FORM: u64 = 3;

impl Tally {
    fn count(&mut self, name: &str, outcome: &Outcome) {
        self.cases += 1;
        *self.endings.entry(outcome.ending.vector).or_default() += 1;
        if !outcome.ending.is_exception() {
            *self.incomparable.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// Looks into a difference, if it is not one of many.
    fn diverged(
        &mut self,
        sighting: &Sighting<'_>,
        name: Name,
        seed: u64,
        effort: Effort,
        pair: &mut Pair<'_>,
    ) -> Result<()> {
        let many = self.divergences.len() >= effort.kept || self.unsteadies.len() >= effort.kept;
        let form = name.of(sighting.batch.program(sighting.index));
        let count = self.diverging.get(&form).copied().unwrap_or(0);
        if many || count >= OF_ONE_FORM {
            let form = match name {
                Name::Form(_) => form,
                Name::Program => "further programs".into(),
            };
            *self.diverging.entry(form).or_default() += 1;
            return Ok(());
        }
        let divergence = Divergence::examine(pair, sighting, name, seed)?;
        if effort.progress == Progress::Shown {
            eprintln!("{divergence}");
        }
        let (counts, kept) = match divergence.trials.verdict() {
            Verdict::HostUnsteady => (&mut self.unsteady, &mut self.unsteadies),
            Verdict::Differs | Verdict::SubjectChanged => {
                (&mut self.diverging, &mut self.divergences)
            }
        };
        let count = counts.entry(divergence.name.clone()).or_default();
        *count += 1;
        // A second one of a form only where it doesn't come back: each of these is worth a look.
        if *count == 1 || !divergence.trials.is_reproducible() {
            kept.push(divergence);
        }
        Ok(())
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
