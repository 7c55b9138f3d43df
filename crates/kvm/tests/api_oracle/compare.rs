//! The same steps on both sides, and what differs.

use std::fmt;
use std::time::Duration;

use kvm::{PagingPath, System};
use kvm_bindings::kvm_cpuid_entry2;

use crate::call::{Input, Step};
use crate::perform::{Seen, World};
use crate::side::{Answer, Side, Whose};
use crate::watch::Watch;

/// The first difference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The step after which it was seen.
    pub(crate) step: usize,
    text: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `struct kvm_cpuid2` with what ours supports: both vCPUs get it.
fn cpuid() -> Vec<u8> {
    let system = System::new(PagingPath::Nested);
    let entries: Vec<kvm_cpuid_entry2> = system.supported_cpuid().to_vec();
    let mut bytes = (entries.len() as u32).to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    for e in entries {
        for word in [
            e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0,
        ] {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

/// How two runs of a sequence compare.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// There is no `/dev/kvm`.
    NoKernel,
    Same,
    Differ(Difference),
}

/// Runs a sequence on both.
pub(crate) fn run(
    steps: &[Step],
    paging: PagingPath,
    watch: &Watch,
    patience: Duration,
) -> Compared {
    let open = |whose| Side::open(whose).map(|side| World::new(side, cpuid(), patience));
    let (Some(mut kernel), Some(mut user)) = (open(Whose::Kernel), open(Whose::User(paging)))
    else {
        return Compared::NoKernel;
    };
    for (step, what) in steps.iter().enumerate() {
        let there = kernel.perform(what, watch);
        if there.0 == Err(libc::ENOSPC) || gave_up(&there.1) {
            return Compared::Same;
        }
        let here = user.perform(what, watch);
        if took_it_late(&there.1, &here.1) {
            return Compared::Same;
        }
        let (state, ours) = (kernel.snapshot(), user.snapshot());
        let difference = answers(&there, &here).or_else(|| differ(&state, &ours));
        // Interrupted in the middle of a repetition: the two need not be at the same element.
        let repeating = state.iter().filter(|(name, _)| name.ends_with(" regs"));
        for (vcpu, (_, regs)) in repeating.enumerate() {
            if regs[0x8a] & 1 != 0 {
                kernel.wild[vcpu] = true;
                user.wild[vcpu] = true;
            }
        }
        if let Some(text) = difference {
            return Compared::Differ(Difference { step, text });
        }
    }
    match differ(&kernel.remains(), &user.remains()) {
        None => Compared::Same,
        Some(text) => Compared::Differ(Difference {
            step: steps.len().saturating_sub(1),
            text,
        }),
    }
}

/// A KVM in software has no emulation for some instructions, and gives `ENOSPC`, which kvm.ko knows
/// nowhere on x86, where it finds no memory: what follows says nothing.
fn gave_up(seen: &Seen) -> bool {
    seen.iter()
        .any(|(name, bytes)| name == "exit" && bytes.starts_with(b"reason 17 "))
}

/// Where interrupts become allowed while one of the 8259's waits, a KVM in software may take it only at
/// the next entry, not behind the shadow of `STI` (SDM 3A, 6.8.1). Then it leaves once or several
/// times with interrupts allowed before it comes to the same exit of the handler; what it has done in
/// between says nothing.
fn took_it_late(there: &Seen, here: &Seen) -> bool {
    fn exits(seen: &Seen) -> Vec<&[u8]> {
        let exits = seen.iter().filter(|(name, _)| name == "exit");
        exits.map(|(_, bytes)| bytes.as_slice()).collect()
    }
    let says = |exit: &[u8], what: &str| exit.windows(what.len()).any(|w| w == what.as_bytes());
    let (there, here) = (exits(there), exits(here));
    let Some(at) = there.iter().zip(&here).position(|(a, b)| a != b) else {
        return false;
    };
    let handler = says(here[at], "port 0xe0 ") && says(here[at], "if/ready/cr8/base [0, ");
    handler && says(there[at], "if/ready/cr8/base [1, 1, ") && there[at + 1..].contains(&here[at])
}

fn answers(there: &(Answer, Seen), here: &(Answer, Seen)) -> Option<String> {
    if there.0 != here.0 {
        return Some(format!(
            "the kernel answers {:?}, ours {:?}; seen {:?} and {:?}",
            there.0,
            here.0,
            text(&there.1),
            text(&here.1)
        ));
    }
    differ(&there.1, &here.1)
}

fn text(seen: &Seen) -> Vec<String> {
    seen.iter()
        .filter(|(name, _)| name == "exit" || name == "finish")
        .map(|(name, bytes)| show(name, bytes))
        .collect()
}

fn show(name: &str, bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if name == "exit" || name == "finish" => format!("{name}: {text}"),
        _ => format!("{name}: {bytes:x?}"),
    }
}

fn differ(there: &Seen, here: &Seen) -> Option<String> {
    for ((name, there), (_, here)) in there.iter().zip(here) {
        if there == here || is_regs(name) && in_repetition(there, here) {
            continue;
        }
        if name == "exit" || name == "finish" {
            return Some(format!(
                "kernel {}\n        ours   {}",
                show(name, there),
                show(name, here)
            ));
        }
        let at = there
            .iter()
            .zip(here)
            .position(|(a, b)| a != b)
            .unwrap_or(there.len().min(here.len()));
        let word = at & !7;
        let part = |bytes: &[u8]| {
            format!(
                "{:02x?}",
                &bytes[word.min(bytes.len())..(word + 8).min(bytes.len())]
            )
        };
        return Some(format!(
            "{name} at {at:#x}: kernel {}, ours {}",
            part(there),
            part(here)
        ));
    }
    (there.len() != here.len())
        .then(|| format!("kernel {:?}\n        ours   {:?}", text(there), text(here)))
}

fn is_regs(name: &str) -> bool {
    name.ends_with(" regs") || name == "regs before"
}

/// In the middle of a repeated string instruction kvm.ko's emulator sets RF, and leaves RIP there also
/// when there is nothing left to repeat.
fn in_repetition(there: &[u8], here: &[u8]) -> bool {
    let mut shown = there.to_vec();
    let repeats = shown[0x8a] & 1 != 0;
    shown[0x80..0x88].copy_from_slice(&here[0x80..0x88]);
    shown[0x8a] &= !1;
    repeats && shown == here
}

/// A step as a line.
pub(crate) fn describe(step: &Step) -> String {
    match step {
        Step::Call {
            name,
            on,
            input: Input::Bytes { bytes, patches },
            ..
        } => {
            let words: Vec<String> = bytes
                .chunks(8)
                .map(|chunk| {
                    let mut word = [0; 8];
                    word[..chunk.len()].copy_from_slice(chunk);
                    format!("{:x}", u64::from_le_bytes(word))
                })
                .collect();
            format!("{name} on {on:?}: {} {patches:x?}", words.join(" "))
        }
        Step::Call {
            name,
            on,
            input: Input::Number(number),
            ..
        } => format!("{name} on {on:?}: {number:#x}"),
        Step::Change {
            name,
            on,
            changes,
            header,
            ..
        } => format!("change {name} {header:?} on {on:?}: {changes:x?}"),
        Step::Run {
            vcpu,
            guest,
            exits,
            answer,
        } => {
            format!(
                "run {vcpu} {:?} {:02x?} rflags {:#x} regs {:x?}, {exits} exits, answer {answer:x}",
                guest.mode, guest.code, guest.rflags, guest.regs
            )
        }
        other => format!("{other:x?}"),
    }
}
