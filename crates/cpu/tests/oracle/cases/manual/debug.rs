//! Steps and breakpoints.

use super::*;
use crate::layout::{DATA, HLT};
use x86::rflags;

const DB: u8 = 1;
const STEP: u64 = 1 << 14;

fn dr6(bits: u64) -> impl Fn(&Outcome) {
    move |outcome| assert_eq!(outcome.state.dr6 & 0xe00f, bits)
}

fn step(name: &str, start: Start, code: &[u8], rip: u64) -> Case {
    Case::new(name, start, code, Fault(DB, None, rip))
        .state(|state| state.rflags |= rflags::TF)
        .also(dr6(STEP))
}

#[test]
fn steps_over_a_system_call() {
    let entry = HANDLERS + 0x508;
    let prepared = |case: Case, mask: u64| {
        case.state(|state| {
            state.msrs.star = 0x0023_0028_0000_0000;
            state.msrs.lstar = entry;
            state.msrs.sfmask = mask;
        })
        .put(entry, &[HLT])
    };
    let code = [0x0f, 0x05];
    let trapped = step("step syscall", Start::UserLong, &code, entry);
    let masked = Case::new(
        "step syscall masked",
        Start::UserLong,
        &code,
        Halt(entry + 1),
    )
    .state(|state| state.rflags |= rflags::TF);
    by_the_manual(
        vec![prepared(trapped, 0), prepared(masked, rflags::TF)],
        &[(
            "step syscall",
            "user code runs natively, and is not stepped",
        )],
    );
}

#[test]
fn steps_and_flags() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Compatibility, Start::Long] {
        let image = |case: Case, flags: u64| {
            case.state(|state| state.gpr[4] = 0x7f00)
                .put(0x7f00, &flags.to_le_bytes())
        };
        // The flag counts as it was before the instruction.
        let clears = step("popf that clears TF", start, &[0x9d, 0x90], CODE + 1);
        cases.push(image(clears, 2));
        let sets = Case::new(
            "popf that sets TF",
            start,
            &[0x9d, 0x90],
            Fault(DB, None, CODE + 2),
        );
        cases.push(image(sets.also(dr6(STEP)), rflags::TF | 2));
        let code = [0x8e, 0xd0, 0x90, 0x90];
        let shadow = step("step mov ss, nop", start, &code, CODE + 3);
        cases.push(shadow.state(|state| state.gpr[0] = state.segments.ss.selector.into()));
    }
    by_the_manual(
        cases,
        &[("step mov ss", "the emulator has no MOV SS shadow")],
    );
}

#[test]
fn steps_through_a_string() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Compatibility, Start::Long] {
        for (count, rip) in [(3, CODE), (1, CODE + 2)] {
            let case = step("step rep stosb", start, &[0xf3, 0xaa, 0x90], rip)
                .state(|state| state.gpr[1] = count)
                .also(move |outcome| assert_eq!(outcome.state.gpr[1], count - 1));
            cases.push(case);
        }
        // None at all is one step, too.
        let none = step(
            "step rep stosb of nothing",
            start,
            &[0xf3, 0xaa, 0x90],
            CODE + 2,
        );
        cases.push(none.state(|state| state.gpr[1] = 0));
    }
    by_the_manual(
        cases,
        &[("step rep stosb", "the emulator steps over all iterations")],
    );
}

#[test]
fn watchpoints_in_a_string() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Long, Start::UserLong] {
        let case = Case::new(
            "rep stosb over a watch",
            start,
            &[0xf3, 0xaa],
            Fault(DB, None, CODE),
        )
        .state(|state| {
            state.gpr[1] = 8;
            state.dr[2] = DATA + 0x102;
            state.dr7 = 0x400 | 1 << 4 | 0x1 << 24;
        })
        .also(|outcome| {
            // The trap comes behind the iteration that touched it.
            assert_eq!(
                (outcome.state.gpr[1], outcome.state.gpr[7]),
                (5, DATA + 0x103)
            );
            dr6(4)(outcome);
        });
        cases.push(case);
    }
    by_the_manual(cases, &[("rep stosb", "no data breakpoints")]);
}

/// The handler sets RF in what IRET takes back, and the instruction runs.
#[test]
fn resumed_from_an_instruction_breakpoint() {
    let mut cases = Vec::new();
    for (start, handler) in [
        // or dword [esp+8], 0x10000; iret
        (
            Start::Protected32,
            &[0x81, 0x4c, 0x24, 8, 0, 0, 1, 0, 0xcf][..],
        ),
        (Start::User32, &[0x81, 0x4c, 0x24, 8, 0, 0, 1, 0, 0xcf]),
        (Start::Long, &[0x81, 0x4c, 0x24, 16, 0, 0, 1, 0, 0x48, 0xcf]),
        (
            Start::UserLong,
            &[0x81, 0x4c, 0x24, 16, 0, 0, 1, 0, 0x48, 0xcf],
        ),
    ] {
        let code = [0x90, 0x90];
        let case = Case::new("break, RF, iret", start, &code, through(start, &code))
            .state(|state| {
                state.dr[0] = CODE + 1;
                state.dr7 = 0x401;
            })
            .put(HANDLERS + 16, handler)
            .also(dr6(1));
        cases.push(case);
    }
    by_the_manual(cases, &[("UserLong", "user code has no breakpoints")]);
}

/// Faults push RF so that the instruction isn't broken on again; traps and instruction breakpoints
/// do not.
#[test]
fn what_pushes_the_resume_flag() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Compatibility, Start::Long] {
        let width = if start.is_long() { 8 } else { 4 };
        let flag = move |slot: usize, set: bool| {
            move |outcome: &Outcome| {
                let flags = pushed(outcome, width, slot);
                assert_eq!(flags & rflags::RF != 0, set, "{flags:#x}");
            }
        };
        cases.push(
            Case::new("ud2", start, &[0x0f, 0x0b], Fault(UD, None, CODE)).also(flag(2, true)),
        );
        let general = Case::new("mov ds", start, &[0x8e, 0xd8], Fault(GP, Some(0x200), CODE));
        cases.push(general.state(|s| s.gpr[0] = 0x200).also(flag(3, true)));
        let code = [0xcc];
        cases.push(Case::new("int3", start, &code, Fault(3, None, CODE + 1)).also(flag(2, false)));
        let resumed = Case::new("int3 with RF", start, &code, Fault(3, None, CODE + 1));
        let resumed = resumed.state(|state| state.rflags |= rflags::RF);
        cases.push(resumed.also(flag(2, false)));
        let broken = Case::new("break", start, &[0x90], Fault(DB, None, CODE)).state(|state| {
            state.dr[0] = CODE;
            state.dr7 = 0x401;
        });
        cases.push(broken.also(flag(2, false)));
    }
    by_the_manual(cases, &[]);
}

#[test]
fn general_detect() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Compatibility, Start::Long] {
        // mov eax, dr0
        let case = Case::new("GD", start, &[0x0f, 0x21, 0xc0], Fault(DB, None, CODE))
            .state(|state| state.dr7 = 0x2400)
            .also(|outcome| {
                dr6(1 << 13)(outcome);
                assert_eq!(outcome.state.dr7 & 0x2000, 0, "the handler may use them");
            });
        cases.push(case);
    }
    by_the_manual(cases, &[]);
}
