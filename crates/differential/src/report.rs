//! What a reader needs to see of a failing case.

use std::fmt::{self, Write};

use anyhow::Result;
use iced_x86::{Code, Decoder, DecoderOptions, Formatter, GasFormatter, Instruction};

use crate::case::{Case, Extended, Outcome, Program, State};
use crate::compare::{Difference, GPR_NAMES, flags, hex};
use crate::layout::{DATA_BYTES, WRITABLE_BYTES};
use crate::minimise::{Failure, Pair};
use crate::steady::{Again, Sighting, Trials, Verdict};

/// How many differences of one pair of outcomes are printed.
const SHOWN: usize = 24;

/// A case in which the two sides differ.
pub struct Divergence {
    /// What identifies it: the form, or the block.
    pub name: String,
    /// The seed with which it can be drawn again.
    pub seed: u64,
    /// The program.
    pub program: Program,
    /// The state.
    pub case: Case,
    /// What differs.
    pub differences: Vec<Difference>,
    /// How the physical CPU ended.
    pub expected: Outcome,
    /// What came of running both sides again.
    pub trials: Trials,
    /// Both sides as they were at first, where that does not come back.
    pub once: Option<Box<Once>>,
    /// What the side under test had to say.
    pub remarks: Vec<String>,
}

/// Two outcomes that differed, of which the difference does not come back.
pub struct Once {
    /// Memory before the case.
    pub before: Vec<u8>,
    /// The oracle's.
    pub expected: Outcome,
    /// That of the side under test.
    pub found: Outcome,
}

/// What a divergence is called.
#[derive(Clone, Copy, Debug)]
pub enum Name {
    /// After the form that was drawn.
    Form(Code),
    /// After the forms that are left of the program when it has been made small.
    Program,
}

impl Name {
    /// The name, of this program.
    pub fn of(self, program: &Program) -> String {
        match self {
            Self::Form(code) => format!("{code:?}"),
            Self::Program => forms(program).join(" "),
        }
    }
}

impl Divergence {
    /// Runs both sides again. What comes back is made small; what does not is kept as it was.
    pub fn examine(
        pair: &mut Pair<'_>,
        sighting: &Sighting<'_>,
        name: Name,
        seed: u64,
    ) -> Result<Self> {
        let trials = sighting.again(pair)?;
        pair.subject.remarks();
        let alone = sighting.alone();
        let mut failure = Failure {
            program: alone.programs[0],
            case: alone.cases[0],
            pattern: alone.pattern,
            tolerance: sighting.tolerance,
        };
        let mut differences = sighting.differences.clone();
        let mut once = None;
        if trials.is_reproducible() {
            failure = pair.minimise(failure)?;
            differences = pair.run(&failure)?.0;
        } else {
            once = Some(Box::new(Once {
                before: before(&failure),
                expected: *sighting.expected,
                found: *sighting.found,
            }));
        }
        Ok(Self {
            name: name.of(&failure.program),
            seed,
            program: failure.program,
            case: failure.case,
            differences,
            expected: *sighting.expected,
            trials,
            once,
            remarks: pair.subject.remarks(),
        })
    }
}

/// The data as the case finds it.
fn before(failure: &Failure) -> Vec<u8> {
    let mut data: Vec<u8> = failure.pattern.to_vec();
    for patch in &failure.case.patches {
        let (at, len) = (patch.offset as usize, patch.len as usize);
        data[at..at + len].copy_from_slice(&patch.bytes[..len]);
    }
    debug_assert_eq!(data.len(), DATA_BYTES);
    data
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (seed {:#x})", self.name, self.seed)?;
        for line in disassemble(&self.program) {
            writeln!(f, "    {line}")?;
        }
        writeln!(f, "  from {}", describe(&self.case.state))?;
        for patch in self.case.patches.iter().filter(|p| p.len != 0) {
            let bytes = hex(&patch.bytes[..patch.len as usize]);
            writeln!(f, "    data+{:#05x}: {bytes}", patch.offset)?;
        }
        let ending = self.expected.ending;
        writeln!(
            f,
            "  native ends by vector {}, error code {:#x}, cr2 {:#x} at {:#x}",
            ending.vector, ending.error_code, ending.cr2, self.expected.state.rip
        )?;
        for remark in self.remarks.iter().take(2) {
            writeln!(f, "  under test: {remark}")?;
        }
        for difference in self.differences.iter().take(SHOWN) {
            writeln!(
                f,
                "    {:14} native {}  found {}",
                difference.place, difference.expected, difference.found
            )?;
        }
        match &self.once {
            Some(once) => self.not_again(f, once),
            None => Ok(()),
        }
    }
}

impl Divergence {
    /// A difference that does not come back, in full.
    fn not_again(&self, f: &mut fmt::Formatter<'_>, once: &Once) -> fmt::Result {
        let Trials {
            native,
            subject,
            agreed,
        } = &self.trials;
        let verdict = match self.trials.verdict() {
            Verdict::HostUnsteady => "THE HOST WAS NOT STEADY: it alone changed its mind",
            Verdict::SubjectChanged => "the side under test changed its mind",
            Verdict::Differs => "not always the same difference",
        };
        writeln!(
            f,
            "  run {} times again, {} of these alone: {verdict}; the sides agreed {agreed} times",
            native.runs(),
            native.alone.len(),
        )?;
        changes(f, "native", native)?;
        changes(f, "under test", subject)?;
        writeln!(f, "  native at first: {}", full(&once.expected))?;
        written(f, &once.before, &once.expected)?;
        writeln!(f, "  under test at first: {}", full(&once.found))?;
        written(f, &once.before, &once.found)
    }
}

/// What one side said later that it did not say at first.
fn changes(f: &mut fmt::Formatter<'_>, side: &str, again: &Again) -> fmt::Result {
    writeln!(f, "  {side}: another result {} times", again.changes())?;
    let runs = [("batch", &again.batches), ("alone", &again.alone)];
    for (what, run, changed) in runs.iter().flat_map(|(what, runs)| {
        let numbered = runs.iter().enumerate();
        numbered.map(move |(run, changed)| (what, run, changed))
    }) {
        for change in changed.iter().take(SHOWN) {
            writeln!(
                f,
                "    {what} {run}: {:14} first {}  then {}",
                change.place, change.expected, change.found
            )?;
        }
    }
    Ok(())
}

/// Every register of an outcome, and how it ended.
fn full(outcome: &Outcome) -> String {
    let (ending, state) = (outcome.ending, &outcome.state);
    format!(
        "vector {:#x}, error code {:#x}, cr2 {:#x}, rip {:#x}, selectors {:x?}\n    {}",
        ending.vector,
        ending.error_code,
        ending.cr2,
        state.rip,
        state.selectors,
        describe(state)
    )
}

/// What the case wrote.
fn written(f: &mut fmt::Formatter<'_>, before: &[u8], outcome: &Outcome) -> fmt::Result {
    let lines = before[..WRITABLE_BYTES]
        .chunks(16)
        .zip(outcome.memory.chunks(16));
    let changed = lines.enumerate().filter(|(_, (old, new))| old != new);
    for (index, (old, new)) in changed.take(SHOWN) {
        let (old, new) = (hex(old), hex(new));
        writeln!(f, "    data+{:#05x}: {old} became {new}", index * 16)?;
    }
    Ok(())
}

/// The program in AT&T syntax, with its bytes; `NOP`s that the minimiser left are not shown.
pub fn disassemble(program: &Program) -> Vec<String> {
    let options = DecoderOptions::NONE;
    let decoder = Decoder::with_ip(
        program.mode.bitness(),
        program.code(),
        program.entry(),
        options,
    );
    let mut formatter = GasFormatter::new();
    let lines = decoder.into_iter().map(|instruction| {
        let at = (instruction.ip() - program.entry()) as usize;
        let bytes = &program.code()[at..at + instruction.len()];
        (bytes != [0x90]).then(|| line(&mut formatter, &instruction, bytes))
    });
    lines.flatten().collect()
}

/// The forms of which the program consists, without `NOP`s and `INT3`s.
pub fn forms(program: &Program) -> Vec<String> {
    let options = DecoderOptions::NONE;
    Decoder::with_ip(program.mode.bitness(), program.code(), 0, options)
        .into_iter()
        .filter(|instruction| !matches!(instruction.code(), Code::Nopd | Code::Int3))
        .map(|instruction| format!("{:?}", instruction.code()))
        .collect()
}

fn line(formatter: &mut GasFormatter, instruction: &Instruction, bytes: &[u8]) -> String {
    let mut text = String::new();
    formatter.format(instruction, &mut text);
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let (ip, bytes, code) = (instruction.ip(), bytes.join(" "), instruction.code());
    format!("{ip:x}: {bytes:30} {text}  ({code:?})")
}

fn describe(state: &State) -> String {
    let mut text = flags(state.rflags);
    for (name, value) in GPR_NAMES.iter().zip(state.gpr) {
        if value != 0 {
            let _ = write!(text, " {name}={value:#x}");
        }
    }
    let _ = write!(text, " fs={:#x} gs={:#x}", state.fs_base, state.gs_base);
    text + &describe_extended(&state.extended)
}

fn describe_extended(extended: &Extended) -> String {
    let plain = Extended::initial();
    let mut text = String::new();
    if extended.mxcsr() != plain.mxcsr() {
        let _ = write!(text, " mxcsr={:#x}", extended.mxcsr());
    }
    for (name, at) in [("fcw", 0), ("fsw", 2), ("ftw", 4)] {
        if extended.word(at) != plain.word(at) {
            let _ = write!(text, " {name}={:#x}", extended.word(at));
        }
    }
    for index in 0..8 {
        let bytes = &extended.0[32 + 16 * index..][..10];
        if bytes.iter().any(|b| *b != 0) {
            let _ = write!(text, "\n    st{index}={}", hex(bytes));
        }
    }
    for index in 0..16 {
        let value = extended.ymm(index);
        if value != [0; 32] {
            let _ = write!(text, "\n    ymm{index}={}", hex(&value));
        }
    }
    text
}
