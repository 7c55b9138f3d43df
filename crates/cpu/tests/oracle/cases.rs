//! The guests, by subject.

mod control;
mod exceptions;
mod far;
mod flags;
mod interrupts;
mod io;
mod msr;
mod segments;
mod syscalls;
mod tasks;

use crate::compare::differences;
use crate::guest::{Guest, Outcome};
use crate::kernel::Kernel;
use crate::layout::{Start, sel};
use crate::ours::Ours;

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

const HLT: u8 = 0xf4;

/// A deviation of `/dev/kvm` from the manuals: the cases whose names hold all these words, and why.
struct Deviation {
    words: &'static [&'static str],
    reason: &'static str,
}

/// Runs the guests on both, and fails with all differences that no deviation explains.
fn agree(guests: Vec<Guest>, deviations: &[Deviation]) {
    let Some(mut kernel) = Kernel::open() else {
        return;
    };
    let mut ours = Ours::new(&kernel.cpuid);
    let mut report = Vec::new();
    let (count, mut excused) = (guests.len(), 0);
    for guest in guests {
        let theirs = kernel.run(&guest);
        let lines = differences(&ours.run(&guest), &theirs);
        if lines.is_empty() {
            continue;
        }
        let words = |deviation: &&Deviation| {
            deviation.words.iter().all(|word| guest.name.contains(word))
        };
        if let Some(deviation) = deviations.iter().find(words) {
            assert!(!deviation.reason.is_empty());
            excused += 1;
        } else {
            report.push(format!("{}\n    {}", guest.name, lines.join("\n    ")));
        }
    }
    println!("{count} guests, {excused} of them where /dev/kvm deviates from the manuals");
    let shown = report.iter().take(25).cloned().collect::<Vec<_>>().join("\n");
    assert!(report.is_empty(), "{} of {count} guests differ:\n{shown}", report.len());
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

/// What a single guest becomes on both.
#[allow(dead_code, reason = "for looking at one guest while writing cases")]
fn both(guest: &Guest) -> Option<(Outcome, Outcome)> {
    let mut kernel = Kernel::open()?;
    let mut ours = Ours::new(&kernel.cpuid);
    Some((ours.run(guest), kernel.run(guest)))
}
