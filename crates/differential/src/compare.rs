//! Two outcomes of one case, side by side.

use std::fmt::Write;

use crate::case::{Ending, Extended, Outcome, State, selector};
use crate::generate::Tolerance;

/// The names of the general registers in the encoding's order.
pub const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// From here on Linux says of every address that it is present: it doesn't tell user code what its
/// own half looks like (`sanitize_error_code` in `arch/x86/mm/fault.c`).
const KERNEL_HALF: u64 = 0x7fff_ffff_f000;

/// Something that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What: a register, a flag, memory.
    pub place: String,
    /// On the physical CPU.
    pub expected: String,
    /// On the CPU under test.
    pub found: String,
}

/// What differs between two outcomes.
pub fn compare(expected: &Outcome, found: &Outcome, tolerance: Tolerance) -> Vec<Difference> {
    let mut list = List(Vec::new());
    list.ending(expected.ending, found.ending, tolerance);
    if !expected.ending.is_exception() || !found.ending.is_exception() {
        return list.0;
    }
    list.registers(&expected.state, &found.state, tolerance);
    list.flags(expected.state.rflags, found.state.rflags);
    list.extended(&expected.state.extended, &found.state.extended);
    list.memory(&expected.memory, &found.memory);
    list.0
}

struct List(Vec<Difference>);

impl List {
    fn hex(&mut self, place: &str, expected: u64, found: u64) {
        if expected != found {
            self.push(place, format!("{expected:#x}"), format!("{found:#x}"));
        }
    }

    fn push(&mut self, place: &str, expected: String, found: String) {
        self.0.push(Difference {
            place: place.to_owned(),
            expected,
            found,
        });
    }

    fn ending(&mut self, expected: Ending, found: Ending, tolerance: Tolerance) {
        self.hex("vector", expected.vector.into(), found.vector.into());
        let present = u32::from(expected.vector == 14 && expected.cr2 >= KERNEL_HALF);
        self.hex(
            "error code",
            (expected.error_code | present).into(),
            (found.error_code | present).into(),
        );
        if !tolerance.fault_address {
            self.hex("cr2", expected.cr2, found.cr2);
        }
    }

    fn registers(&mut self, expected: &State, found: &State, tolerance: Tolerance) {
        for (index, name) in GPR_NAMES.iter().enumerate() {
            if tolerance.gprs >> index & 1 == 0 {
                self.hex(name, expected.gpr[index], found.gpr[index]);
            }
        }
        self.hex("rip", expected.rip, found.rip);
        self.hex("fs base", expected.fs_base, found.fs_base);
        self.hex("gs base", expected.gs_base, found.gs_base);
        let names = [
            ("es", selector::ES),
            ("cs", selector::CS),
            ("ss", selector::SS),
            ("ds", selector::DS),
            ("fs", selector::FS),
            ("gs", selector::GS),
        ];
        for (name, index) in names {
            let of = |state: &State| visible(state.selectors[index]);
            self.hex(name, of(expected), of(found));
        }
    }

    fn flags(&mut self, expected: u64, found: u64) {
        if expected != found {
            self.push("rflags", flags(expected), flags(found));
        }
    }

    fn extended(&mut self, expected: &Extended, found: &Extended) {
        if expected.0 == found.0 {
            return;
        }
        // The host's kernel saves FOP, FIP and FDP with what the silicon shows: on AMD's only while an
        // unmasked exception waits.
        if expected.word(2) & found.word(2) & 0x80 != 0 {
            for (name, at) in [
                ("fop", 6),
                ("fip", 8),
                ("fip+2", 10),
                ("fdp", 16),
                ("fdp+2", 18),
            ] {
                self.hex(name, expected.word(at).into(), found.word(at).into());
            }
        }
        let words = [("fcw", 0), ("fsw", 2), ("ftw", 4)];
        for (name, at) in words {
            self.hex(name, expected.word(at).into(), found.word(at).into());
        }
        self.hex("mxcsr", expected.mxcsr().into(), found.mxcsr().into());
        for index in 0..8 {
            let at = 32 + 16 * index;
            self.bytes(
                &format!("r{index} of x87"),
                &expected.0[at..at + 10],
                &found.0[at..at + 10],
            );
        }
        for index in 0..16 {
            let name = format!("ymm{index}");
            self.bytes(&name, &expected.ymm(index), &found.ymm(index));
        }
    }

    fn memory(&mut self, expected: &[u8], found: &[u8]) {
        if expected == found {
            return;
        }
        for (index, (e, f)) in expected.chunks(16).zip(found.chunks(16)).enumerate() {
            self.bytes(&format!("memory+{:#05x}", index * 16), e, f);
        }
    }

    fn bytes(&mut self, place: &str, expected: &[u8], found: &[u8]) {
        if expected != found {
            self.push(place, hex(expected), hex(found));
        }
    }
}

/// The kernel's `IRET` to user mode clears what a null selector has in its low bits (SDM 2A, "IRET"),
/// so the oracle can't show them.
fn visible(selector: u16) -> u64 {
    if selector & !3 == 0 {
        0
    } else {
        selector.into()
    }
}

/// Bytes as one number, the last byte first.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes.iter().rev() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Flags by name.
pub fn flags(rflags: u64) -> String {
    const NAMES: [(u64, &str); 15] = [
        (1 << 0, "CF"),
        (1 << 2, "PF"),
        (1 << 4, "AF"),
        (1 << 6, "ZF"),
        (1 << 7, "SF"),
        (1 << 8, "TF"),
        (1 << 9, "IF"),
        (1 << 10, "DF"),
        (1 << 11, "OF"),
        (1 << 12, "IOPL0"),
        (1 << 13, "IOPL1"),
        (1 << 14, "NT"),
        (1 << 16, "RF"),
        (1 << 18, "AC"),
        (1 << 21, "ID"),
    ];
    let set = NAMES.iter().filter(|(bit, _)| rflags & bit != 0);
    let names: Vec<_> = set.map(|(_, name)| *name).collect();
    format!("{rflags:#x} [{}]", names.join(" "))
}
