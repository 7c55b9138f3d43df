//! What a reader needs to see of a failing case.

use std::fmt::{self, Write};

use iced_x86::{Code, Decoder, DecoderOptions, Formatter, GasFormatter, Instruction};

use crate::case::{Case, Extended, Outcome, Program, State};
use crate::compare::{Difference, GPR_NAMES, flags, hex};

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
    /// What the side under test had to say.
    pub remarks: Vec<String>,
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
        for difference in self.differences.iter().take(24) {
            writeln!(
                f,
                "    {:14} native {}  found {}",
                difference.place, difference.expected, difference.found
            )?;
        }
        Ok(())
    }
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
