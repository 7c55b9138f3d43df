//! SYSENTER, SYSEXIT and what a SYSCALL must not change.

use super::*;
use crate::layout::{DATA, HLT};
use x86::rflags;

const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXIT: &[u8] = &[0x0f, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];
const TARGET: u64 = HANDLERS + 0x309;

fn prepared(name: &str, start: Start, code: &[u8], ends: Ends) -> Case {
    Case::new(name, start, code, ends)
        .state(|state| {
            state.msrs.sysenter_cs = 8;
            state.msrs.sysenter_esp = 0x9000;
            state.msrs.sysenter_eip = TARGET - 1;
            state.gpr[1] = 0x7f80;
            state.gpr[2] = 0x7800;
            state.rflags |= rflags::IF;
        })
        .put(TARGET - 1, &[HLT])
        .put(0x7800, &[HLT])
}

#[test]
fn sysenter() {
    let mut cases = Vec::new();
    for start in Start::ALL {
        if start == Start::Real {
            let case = prepared("sysenter", start, SYSENTER, Fault(GP, None, 0x7000));
            cases.push(case);
            continue;
        }
        let entered = prepared("sysenter", start, SYSENTER, Halt(TARGET)).also(move |outcome| {
            let state = &outcome.state;
            assert_eq!((state.gpr[4], state.cpl()), (0x9000, 0), "{start:?}");
            assert_eq!(state.rflags & (rflags::IF | rflags::VM), 0);
            let selectors = (state.segments.cs.selector, state.segments.ss.selector);
            assert_eq!(selectors, (0x8, 0x10));
        });
        cases.push(entered);
        let ends = Fault(GP, Some(0), 0x7000);
        let null = prepared("sysenter without a CS", start, SYSENTER, ends)
            .state(|state| state.msrs.sysenter_cs = 3);
        cases.push(null);
    }
    by_the_manual(
        cases,
        &[
            ("ompatibility: sysenter", "as on AMD, not in long mode"),
            ("Long: sysenter", "as on AMD, not in long mode"),
        ],
    );
}

#[test]
fn sysexit() {
    let mut cases = Vec::new();
    let to_level_3 = |outcome: &Outcome, selector: u64| {
        // The frame of the #GP that `HLT` raised: error code, RIP, CS, flags, RSP, SS.
        let width = if outcome.state.msrs.efer >> 10 & 1 == 0 {
            4
        } else {
            8
        };
        let frame = [2, 4, 5].map(|slot| pushed(outcome, width, slot));
        assert_eq!(frame, [selector, 0x7f80, selector + 8]);
    };
    for start in [
        Start::Protected16,
        Start::Protected32,
        Start::Compatibility,
        Start::Long,
    ] {
        let case = prepared("sysexit", start, SYSEXIT, user_ends(0x7800));
        cases.push(case.also(move |outcome| to_level_3(outcome, 0x1b)));
        let null = prepared(
            "sysexit without a CS",
            start,
            SYSEXIT,
            Fault(GP, Some(0), 0x7000),
        );
        cases.push(null.state(|state| state.msrs.sysenter_cs = 0));
    }
    let wide = prepared("sysexitq", Start::Long, SYSEXITQ, user_ends(0x7800));
    cases.push(wide.also(move |outcome| to_level_3(outcome, 0x2b)));
    for register in [1, 2] {
        let case = prepared(
            "sysexitq far",
            Start::Long,
            SYSEXITQ,
            Fault(GP, Some(0), 0x7000),
        );
        cases.push(case.state(|state| state.gpr[register] = 1 << 47));
    }
    for start in [Start::User32, Start::UserCompatibility, Start::UserLong] {
        let ends = Fault(GP, Some(0), 0x7000);
        cases.push(prepared("sysexit of user code", start, SYSEXIT, ends));
    }
    cases.push(prepared(
        "sysexit",
        Start::Real,
        SYSEXIT,
        Fault(GP, None, 0x7000),
    ));
    by_the_manual(
        cases,
        &[
            ("ompatibility: sysexit", "as on AMD, not in long mode"),
            ("Long: sysexit", "as on AMD, not in long mode"),
        ],
    );
}

/// FCS and FDS are those of the last x87 instruction, wherever the code went since.
#[test]
fn x87_pointers_behind_a_system_call() {
    // fld qword [rbx]; syscall. There: fxsave [rdi]; hlt
    let code = [0xdd, 0x03, 0x0f, 0x05];
    let entry = HANDLERS + 0x508;
    let case = Case::new(
        "fld, syscall, fxsave",
        Start::UserLong,
        &code,
        Halt(entry + 4),
    )
    .state(|state| {
        state.cr4 |= 1 << 9;
        state.msrs.star = 0x0023_0028_0000_0000;
        state.msrs.lstar = entry;
    })
    .put(entry, &[0x0f, 0xae, 0x07, HLT])
    .also(|outcome| {
        let image = DATA + 0x100;
        let pointers = [8, 12, 16, 20].map(|at| word(outcome, image + at, 4));
        assert_eq!(pointers, [CODE, 0x33, DATA, 0x23]);
    });
    by_the_manual(
        vec![case],
        &[(
            "fxsave",
            "user code runs natively, with the host's selectors",
        )],
    );
}

/// The same by IRET: out of a handler that uses no x87 instruction, and into one that saves.
#[test]
fn x87_pointers_behind_iret() {
    let mut cases = Vec::new();
    for (start, iret) in [
        (Start::User32, &[0xcf][..]),
        (Start::UserCompatibility, &[0x48, 0xcf]),
    ] {
        // fld qword [ebx]; int 0x80 (iret); fnstenv [edi]
        let code = [0xdd, 0x03, 0xcd, 0x80, 0xd9, 0x37];
        let case = Case::new("fld, int, iret, fnstenv", start, &code, user_ends(0x7006))
            .put(HANDLERS + 0x800, iret)
            .also(|outcome| {
                let image = DATA + 0x100;
                let pointers = [12, 16, 20, 24].map(|at| word(outcome, image + at, 4) & 0xffff);
                assert_eq!(pointers, [CODE, 0x1b, DATA, 0x23]);
            });
        cases.push(case);
    }
    by_the_manual(
        cases,
        &[("fnstenv", "its emulator does not keep the selectors")],
    );
}
