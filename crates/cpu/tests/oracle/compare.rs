//! Whether two outcomes are the same, and if not, where they differ.

use cpu::{CpuState, Segment};
use x86::descriptor::attributes;

use crate::guest::{End, Outcome};

/// What differs, a line each; empty where nothing does.
pub fn differences(ours: &Outcome, theirs: &Outcome) -> Vec<String> {
    let mut lines = Vec::new();
    if ours.end != theirs.end {
        lines.push(format!("end: ours {:?}, theirs {:?}", ours.end, theirs.end));
    }
    if ours.seen != theirs.seen {
        lines.push(format!(
            "exits: ours {:x?}, theirs {:x?}",
            ours.seen, theirs.seen
        ));
    }
    // After a shutdown the state is not defined, nor is it where a watch interrupts.
    if ours.end == theirs.end && matches!(ours.end, End::Shutdown | End::Endless) {
        return lines;
    }
    registers(&ours.state, &theirs.state, &mut lines);
    memory(&ours.memory, &theirs.memory, &mut lines);
    lines
}

fn registers(ours: &CpuState, theirs: &CpuState, lines: &mut Vec<String>) {
    let mut compare = |name: &str, a: u64, b: u64| {
        if a != b {
            lines.push(format!("{name}: ours {a:#x}, theirs {b:#x}"));
        }
    };
    for n in 0..16 {
        compare(&format!("gpr[{n}]"), ours.gpr[n], theirs.gpr[n]);
    }
    compare("rip", ours.rip, theirs.rip);
    compare("rflags", ours.rflags, theirs.rflags);
    compare("cr0", ours.cr0, theirs.cr0);
    compare("cr2", ours.cr2, theirs.cr2);
    compare("cr3", ours.cr3, theirs.cr3);
    compare("cr4", ours.cr4, theirs.cr4);
    compare("efer", ours.msrs.efer, theirs.msrs.efer);
    compare("dr6", ours.dr6, theirs.dr6);
    compare("dr7", ours.dr7, theirs.dr7);
    compare("gdt base", ours.gdtr.base, theirs.gdtr.base);
    compare("idt base", ours.idtr.base, theirs.idtr.base);
    compare(
        "idt limit",
        ours.idtr.limit.into(),
        theirs.idtr.limit.into(),
    );
    compare("star", ours.msrs.star, theirs.msrs.star);
    compare("lstar", ours.msrs.lstar, theirs.msrs.lstar);
    compare(
        "kernel gs base",
        ours.msrs.kernel_gs_base,
        theirs.msrs.kernel_gs_base,
    );
    let (a, b) = (&ours.segments, &theirs.segments);
    let pairs = [
        ("es", &a.es, &b.es),
        ("cs", &a.cs, &b.cs),
        ("ss", &a.ss, &b.ss),
        ("ds", &a.ds, &b.ds),
        ("fs", &a.fs, &b.fs),
        ("gs", &a.gs, &b.gs),
        ("ldtr", &a.ldtr, &b.ldtr),
        ("tr", &a.tr, &b.tr),
    ];
    for (name, one, other) in pairs {
        segments(name, one, other, lines);
    }
}

/// Whether nothing can be accessed through the segment, however its owner says so.
fn is_null(segment: &Segment) -> bool {
    segment.unusable || segment.attributes & attributes::P == 0
}

fn segments(name: &str, ours: &Segment, theirs: &Segment, lines: &mut Vec<String>) {
    if is_null(ours) && is_null(theirs) {
        if ours.selector != theirs.selector {
            lines.push(format!(
                "{name}: null; ours {:#x}, theirs {:#x}",
                ours.selector, theirs.selector
            ));
        }
        return;
    }
    if ours != theirs {
        lines.push(format!("{name}: ours {ours:x?}, theirs {theirs:x?}"));
    }
}

fn memory(ours: &[u8], theirs: &[u8], lines: &mut Vec<String>) {
    let differing = ours
        .iter()
        .zip(theirs)
        .enumerate()
        .filter(|(_, (a, b))| a != b);
    for (at, (a, b)) in differing.take(8) {
        lines.push(format!("[{at:#x}]: ours {a:#x}, theirs {b:#x}"));
    }
}
