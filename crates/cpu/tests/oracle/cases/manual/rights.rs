//! What CR4 and the level forbid.

use super::*;
use crate::layout::{DATA, LDT, PML4};
use x86::rflags;

const UMIP: u64 = 1 << 11;
const PCIDE: u64 = 1 << 17;
const OSXSAVE: u64 = 1 << 18;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;

/// Both privileges of each mode.
const STARTS: [Start; 5] = [
    Start::Protected32,
    Start::User32,
    Start::UserCompatibility,
    Start::Long,
    Start::UserLong,
];

#[test]
fn user_mode_instruction_prevention() {
    let mut cases = Vec::new();
    for (name, code) in [
        ("sgdt", [0x0f, 0x01, 0x03]),
        ("sidt", [0x0f, 0x01, 0x0b]),
        ("sldt", [0x0f, 0x00, 0xc0]),
        ("str", [0x0f, 0x00, 0xc8]),
        ("smsw", [0x0f, 0x01, 0xe0]),
    ] {
        for start in STARTS {
            let ends = through(start, &code);
            cases.push(Case::new(
                &format!("{name} without UMIP"),
                start,
                &code,
                ends,
            ));
            let ends = if is_user(start) {
                Fault(GP, Some(0), CODE)
            } else {
                ends
            };
            let case = Case::new(&format!("{name} with UMIP"), start, &code, ends);
            cases.push(case.state(|state| state.cr4 |= UMIP));
        }
    }
    by_the_manual(
        cases,
        &[
            ("with UMIP", "no UMIP"),
            (
                "UserLong",
                "user code runs natively, with the host's tables",
            ),
        ],
    );
}

/// The first 2 MiB are the supervisor's; the same memory again, for users, from here on.
const ALIAS: u64 = 0x40_0000;

/// With SMAP, RBX in the user's pages.
fn prevented(name: &str, code: &[u8], ends: Ends) -> Case {
    Case::new(name, Start::Long, code, ends)
        .put(PML4 + 0x2000, &0x83u64.to_le_bytes())
        .put(PML4 + 0x2010, &0x87u64.to_le_bytes())
        .state(|state| {
            state.cr4 |= SMAP;
            state.gpr[3] = ALIAS + DATA;
        })
}

const NO_SMAP: &[(&str, &str)] = &[("smap", "no SMAP and no SMEP")];

#[test]
fn supervisor_mode_access_prevention() {
    const READ: [u8; 2] = [0x8b, 0x03];
    const WRITE: [u8; 2] = [0x89, 0x03];
    const STAC: [u8; 3] = [0x0f, 0x01, 0xcb];
    const CLAC: [u8; 3] = [0x0f, 0x01, 0xca];
    let faults = |code: u64, rip: u64| Fault(PF, Some(code), rip);
    let joined = |parts: &[&[u8]]| parts.concat();
    let at = |outcome: &Outcome| assert_eq!(outcome.state.cr2, ALIAS + DATA);
    let read_with_stac = joined(&[&STAC, &READ]);
    let all = joined(&[&STAC, &WRITE, &CLAC, &WRITE]);
    // popf of an image with AC, then the read
    let by_popf = joined(&[&[0x9d], &READ]);
    let cases = vec![
        prevented("smap, read", &READ, faults(1, CODE)).also(at),
        prevented("smap, write", &WRITE, faults(3, CODE)).also(at),
        prevented("smap, stac, read", &read_with_stac, Halt(CODE + 6)),
        prevented("smap, stac, write, clac, write", &all, faults(3, CODE + 8)).also(at),
        prevented("smap, popf, read", &by_popf, Halt(CODE + 4))
            .state(|state| state.gpr[4] = 0x7f00)
            .put(0x7f00, &(rflags::AC | 2).to_le_bytes()),
        prevented("smap off", &READ, Halt(CODE + 3)).state(|state| state.cr4 &= !SMAP),
    ];
    by_the_manual(cases, NO_SMAP);
}

/// Accesses that the CPU makes by itself are the supervisor's at every level, and AC is not asked.
#[test]
fn implicit_accesses_are_prevented_too() {
    // mov ds, ax: a selector of the local table
    let code = [0x8e, 0xd8];
    let table = |state: &mut CpuState| {
        state.gpr[0] = 0x0f;
        state.rflags |= rflags::AC;
        state.segments.ldtr.base = ALIAS + LDT;
        state.segments.ldtr.limit = 0xff;
        state.segments.ldtr.attributes = 0x82;
        state.segments.ldtr.selector = 0x50;
        state.segments.ldtr.unusable = false;
    };
    let at = |outcome: &Outcome| assert_eq!(outcome.state.cr2, ALIAS + LDT + 8);
    let kernel = prevented("smap, ldt", &code, Fault(PF, Some(1), CODE)).state(table);
    let mut user = prevented(
        "smap, ldt of user code",
        &code,
        Fault(PF, Some(1), ALIAS + CODE),
    );
    let outer = Case::new("", Start::UserLong, &code, Shutdown).guest.state;
    user.guest.state.segments = outer.segments;
    user = user.state(|state| {
        state.rip = ALIAS + CODE;
        state.gpr[4] += ALIAS;
    });
    let cases = vec![kernel.also(at), user.state(table).also(at)];
    by_the_manual(cases, NO_SMAP);
}

#[test]
fn stac_and_clac_are_the_kernels() {
    let mut cases = Vec::new();
    for (name, code) in [("stac", [0x0f, 0x01, 0xcb]), ("clac", [0x0f, 0x01, 0xca])] {
        for start in [Start::User32, Start::UserCompatibility, Start::UserLong] {
            let name = format!("smap, {name}");
            cases.push(Case::new(&name, start, &code, Fault(UD, None, CODE)));
        }
    }
    by_the_manual(cases, NO_SMAP);
}

#[test]
fn supervisor_mode_execution_prevention() {
    // jmp rbx; there a HLT
    let jump = [0xff, 0xe3];
    let there = ALIAS + 0x7800;
    let case = |cr4: u64, ends: Ends| {
        prevented(&format!("smap, smep {cr4:#x}"), &jump, ends).state(|state| {
            state.gpr[3] = there;
            state.cr4 = state.cr4 & !SMAP | cr4;
        })
    };
    let cases = vec![
        case(0, Halt(there + 1)),
        case(SMEP, Fault(PF, Some(0x11), there)),
    ];
    by_the_manual(cases, NO_SMAP);
}

#[test]
fn invpcid() {
    const INVPCID: [u8; 5] = [0x66, 0x0f, 0x38, 0x82, 0x03];
    let case = |name: &str, kind: u64, descriptor: [u64; 2], cr4: u64, ends: Ends| {
        Case::new(&format!("invpcid, {name}"), Start::Long, &INVPCID, ends)
            .state(|state| {
                state.gpr[0] = kind;
                state.cr4 |= cr4;
            })
            .put(DATA, &descriptor[0].to_le_bytes())
            .put(DATA + 8, &descriptor[1].to_le_bytes())
    };
    let fine = Halt(CODE + 6);
    let general = Fault(GP, Some(0), CODE);
    let mut cases = vec![
        case("address", 0, [5, 0x1234], PCIDE, fine),
        case("context", 1, [5, 0], PCIDE, fine),
        case("all, globals too", 2, [0, 0], 0, fine),
        case("all", 3, [0, 0], 0, fine),
        case("no such type", 4, [0, 0], PCIDE, general),
        case("reserved bits", 1, [1 << 12, 0], PCIDE, general),
        case(
            "reserved bits of a type without a context",
            2,
            [1 << 12, 0],
            PCIDE,
            general,
        ),
        case(
            "address that isn't canonical",
            0,
            [5, 1 << 47],
            PCIDE,
            general,
        ),
        case("context without PCIDE", 1, [5, 0], 0, general),
        case("address in a context without PCIDE", 0, [5, 0], 0, general),
    ];
    let fault = Fault(PF, Some(0), CODE);
    let unmapped = case("unmapped descriptor", 4, [0, 0], PCIDE, fault);
    cases.push(unmapped.state(|state| state.gpr[3] = 0x40_0000));
    for start in [Start::User32, Start::UserCompatibility, Start::UserLong] {
        cases.push(Case::new("invpcid", start, &INVPCID, general));
    }
    by_the_manual(cases, &[("invpcid", "no INVPCID")]);
}

#[test]
fn rdpmc() {
    let mut cases = Vec::new();
    // mov ecx, 0x1234; rdpmc
    let code = [0xb9, 0x34, 0x12, 0, 0, 0x0f, 0x33];
    for start in STARTS {
        for cr4 in [0, 1 << 8] {
            // Forbidden, or no such counter.
            let name = format!("rdpmc, cr4 {cr4:#x}");
            let case = Case::new(&name, start, &code, Fault(GP, Some(0), CODE + 5));
            cases.push(case.state(|state| state.cr4 |= cr4));
        }
    }
    by_the_manual(cases, &[]);
}

#[test]
fn xsetbv() {
    const XSETBV: [u8; 3] = [0x0f, 0x01, 0xd1];
    let case = |start: Start, value: u64, register: u64, ends: Ends| {
        let name = format!("xsetbv {value:#x} to {register}");
        Case::new(&name, start, &XSETBV, ends).state(|state| {
            state.cr4 |= OSXSAVE;
            state.gpr[0] = value & 0xffff_ffff;
            state.gpr[2] = value >> 32;
            state.gpr[1] = register;
        })
    };
    let general = Fault(GP, Some(0), CODE);
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::Compatibility, Start::Long] {
        let taken = |value: u64| move |outcome: &Outcome| assert_eq!(outcome.state.xcr0, value);
        for value in [1, 3, 7] {
            cases.push(case(start, value, 0, Halt(CODE + 4)).also(taken(value)));
        }
        for value in [0, 2, 5, 1 << 8 | 1, 1 << 32 | 1, 1 << 63 | 1] {
            cases.push(case(start, value, 0, general).also(taken(1)));
        }
        cases.push(case(start, 1, 1, general));
        let off = case(start, 1, 0, Fault(UD, None, CODE));
        cases.push(off.state(|state| state.cr4 &= !OSXSAVE));
    }
    for start in [Start::User32, Start::UserCompatibility, Start::UserLong] {
        cases.push(case(start, 1, 0, general));
    }
    by_the_manual(cases, &[("xsetbv", "no XSAVE in its emulator")]);
}
