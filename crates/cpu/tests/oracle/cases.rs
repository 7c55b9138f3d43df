//! The guests, by subject.

mod alone;
mod boot;
mod control;
mod events;
mod exceptions;
mod far;
mod flags;
mod interrupts;
mod io;
mod manual;
mod msr;
mod segments;
mod syscalls;
mod tasks;

use crate::compare::differences;
use crate::guest::{End, Guest, Outcome};
use crate::kernel::Kernel;
use crate::layout::{HANDLERS, HLT, Start, sel};
use crate::ours::Ours;
use x86::rflags;

/// Every selector worth trying.
const SELECTORS: [u16; 30] = [
    0,
    3,
    sel::CODE32,
    sel::CODE32 | 3,
    sel::DATA32,
    sel::DATA32 | 1,
    sel::DATA32 | 3,
    sel::USER_CODE32,
    sel::USER_DATA32,
    sel::USER_DATA32 & !3,
    sel::CODE64,
    sel::USER_CODE64,
    sel::TSS,
    sel::CONFORMING,
    sel::CONFORMING | 3,
    sel::LDT,
    sel::CODE16,
    sel::DATA16,
    sel::GATE,
    sel::TSS2,
    sel::TASK_GATE,
    sel::ABSENT_DATA,
    sel::ABSENT_DATA | 3,
    sel::READ_ONLY | 3,
    sel::EXECUTE_ONLY | 3,
    sel::EXPAND_DOWN | 3,
    sel::USER_CODE16,
    sel::ABSENT_CODE | 3,
    sel::OUTSIDE,
    0x0f, // in the LDT
];

/// Where `/dev/kvm` may deviate from the manuals. Hardware-assisted KVM deviates nowhere here; the
/// software KVM of some hosts does, and says so by what it does.
struct Deviation {
    reason: &'static str,
    applies: fn(&Pair<'_>) -> bool,
}

/// A guest on both sides, with what differs.
struct Pair<'a> {
    guest: &'a Guest,
    ours: &'a Outcome,
    theirs: &'a Outcome,
    lines: &'a [String],
}

impl Pair<'_> {
    fn named(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.guest.name.contains(word))
    }

    fn is_user(&self) -> bool {
        self.named(&["User32", "UserCompatibility", "UserLong"])
    }

    /// Whether only these differ.
    fn only(&self, what: &[&str]) -> bool {
        self.lines
            .iter()
            .all(|line| what.iter().any(|word| line.starts_with(word)))
    }
}

const UNDEFINED_HANDLER: u64 = HANDLERS + 0x61;

const DEVIATIONS: &[Deviation] = &[
    Deviation {
        reason: "no 32-bit and no PAE paging",
        applies: |pair| {
            let paged = |outcome: &Outcome| outcome.state.cr0 >> 31 != 0;
            let legacy = |outcome: &Outcome| outcome.state.msrs.efer & 1 << 10 == 0;
            pair.guest.name.starts_with("Paged32")
                || paged(pair.ours) && legacy(pair.ours) && !paged(pair.theirs)
        },
    },
    Deviation {
        reason: "an instruction that its emulator does not know",
        applies: |pair| matches!(pair.theirs.end, End::Failed(_)),
    },
    Deviation {
        reason: "an instruction that its emulator does not know, as #UD in user mode",
        applies: |pair| pair.is_user() && pair.theirs.state.rip == UNDEFINED_HANDLER,
    },
    Deviation {
        reason: "events in virtual-8086 mode don't save its segments",
        applies: |pair| {
            let left = |outcome: &Outcome| outcome.state.rflags & rflags::VM == 0;
            let begun = pair.guest.state.rflags & rflags::VM != 0;
            begun && (left(pair.ours) || pair.ours.end == End::Shutdown)
                || pair.named(&["iret flags 0x2"])
        },
    },
    Deviation {
        reason: "its emulator goes round in circles",
        applies: |pair| pair.theirs.end == End::Endless,
    },
    Deviation {
        reason: "IOPL of user code and of IRET is dropped",
        applies: |pair| pair.only(&["rflags", "[0x8f"]) && iopl(pair.ours) != iopl(pair.theirs),
    },
    Deviation {
        reason: "data segments of an inner level survive IRET",
        applies: |pair| pair.only(&["es:", "ds:", "fs:", "gs:", "rflags", "cr2", "[0x8fd"]),
    },
];

fn iopl(outcome: &Outcome) -> u64 {
    outcome.state.rflags & rflags::IOPL
}

/// Runs the guests on both, and fails with all differences that no deviation explains: neither the
/// general ones nor those that these guests have by their names.
fn agree(guests: Vec<Guest>, excused: &[(&str, &str)]) {
    let Some(mut kernel) = Kernel::open() else {
        return;
    };
    let mut ours = Ours::new(&kernel.cpuid);
    let mut report = Vec::new();
    let (count, mut deviating) = (guests.len(), 0);
    for guest in guests {
        let (ours, theirs) = (ours.run(&guest), kernel.run(&guest));
        let lines = &differences(&ours, &theirs);
        if lines.is_empty() {
            continue;
        }
        let pair = Pair {
            guest: &guest,
            ours: &ours,
            theirs: &theirs,
            lines,
        };
        let general = DEVIATIONS
            .iter()
            .find(|deviation| (deviation.applies)(&pair));
        let reason = general.map(|deviation| deviation.reason);
        let named = || {
            excused
                .iter()
                .find(|(word, _)| pair.named(&[word]))
                .map(|it| it.1)
        };
        if let Some(reason) = reason.or_else(named) {
            assert!(!reason.is_empty());
            deviating += 1;
        } else {
            report.push(format!("{}\n    {}", guest.name, lines.join("\n    ")));
        }
    }
    println!("{count} guests; {deviating} where /dev/kvm deviates from the manuals");
    let shown = report
        .iter()
        .take(60)
        .cloned()
        .collect::<Vec<_>>()
        .join("\n");
    assert!(
        report.is_empty(),
        "{} of {count} guests differ:\n{shown}",
        report.len()
    );
}

/// The code, then a `HLT`.
fn then_halt(code: &[u8]) -> Vec<u8> {
    let mut code = code.to_vec();
    code.push(HLT);
    code
}

/// One guest per mode that runs this code, with RAX as given.
fn everywhere(name: &str, code: &[u8], rax: u64) -> Vec<Guest> {
    Start::ALL
        .into_iter()
        .map(|start| with_rax(name, start, code, rax))
        .collect()
}

fn with_rax(name: &str, start: Start, code: &[u8], rax: u64) -> Guest {
    let mut guest = Guest::new(name, start, &then_halt(code));
    guest.state.gpr[0] = rax;
    guest.state.gpr[3] = crate::layout::DATA;
    guest.state.gpr[6] = crate::layout::DATA;
    guest.state.gpr[7] = crate::layout::DATA + 0x100;
    guest
}
