//! String instructions that fault half-way, and branches to where no code can be.

use super::*;
use crate::layout::{DATA, PML4};

/// The first page that 32-bit tables map to nothing, and its entry.
const HOLE: u64 = 0x4_0000;
const HOLE_ENTRY: u32 = 0xf000 + 4 * 64;

/// Eight bytes go, then the next page isn't there.
fn half_way(name: &str, code: &[u8], ends: Ends) -> Case {
    let bytes: Vec<u8> = (1..=0x20).collect();
    Case::new(name, Start::Paged32, code, ends)
        .put(DATA, &bytes)
        .state(|state| {
            state.gpr[1] = 0x20;
            state.gpr[7] = HOLE - 8;
        })
}

#[test]
fn a_fault_amid_a_string() {
    let case = half_way("rep movsb", &[0xf3, 0xa4], Fault(PF, Some(2), CODE)).also(|outcome| {
        let state = &outcome.state;
        let left = [state.gpr[1], state.gpr[6], state.gpr[7]];
        assert_eq!(left, [0x18, DATA + 8, HOLE]);
        assert_eq!(state.cr2, HOLE);
        assert_eq!(word(outcome, HOLE - 8, 8), 0x0807_0605_0403_0201);
    });
    by_the_manual(vec![case], &[]);
}

#[test]
fn a_string_goes_on_behind_the_fault() {
    // mov dword [entry], DATA + 0x1000 | 7; add esp, 4; iret
    let mut handler = vec![0xc7, 0x05];
    handler.extend(HOLE_ENTRY.to_le_bytes());
    handler.extend((0x1_0000u32 | 7).to_le_bytes());
    handler.extend([0x83, 0xc4, 4, 0xcf]);
    let case = half_way("rep movsb, and on", &[0xf3, 0xa4], Halt(CODE + 3))
        // The other handlers behind it are not called.
        .put(HANDLERS + 14 * 16, &handler)
        .also(|outcome| {
            let state = &outcome.state;
            let left = [state.gpr[1], state.gpr[6], state.gpr[7]];
            assert_eq!(left, [0, DATA + 0x20, HOLE + 0x18]);
            assert_eq!(word(outcome, 0x1_0000, 8), 0x100f_0e0d_0c0b_0a09);
            assert_eq!(word(outcome, 0x1_0010, 8), 0x201f_1e1d_1c1b_1a19);
        });
    by_the_manual(vec![case], &[]);
}

/// The last page of the lower half.
const EDGE: u64 = 0x7fff_ffff_f000;

/// Code that ends 14 bytes in front of what isn't canonical.
fn at_the_edge(name: &str, code: &[u8], ends: Ends) -> Case {
    let tables = [
        (PML4 + 8 * 255, (PML4 + 0x1000) | 7),
        (PML4 + 0x1000 + 8 * 511, (PML4 + 0x2000) | 7),
        (PML4 + 0x2000 + 8 * 511, 0x5007),
        (0x5000 + 8 * 511, CODE | 7),
    ];
    let mut case = Case::new(name, Start::Long, &[], ends).put(CODE + 0xff0, code);
    for (at, entry) in tables {
        case = case.put(at, &entry.to_le_bytes());
    }
    case.state(|state| state.rip = EDGE + 0xff0)
}

/// The fault leaves everything as it was, the counter and the stack too.
#[test]
fn branches_beyond_the_canonical_half() {
    let general = Fault(GP, Some(0), EDGE + 0xff0);
    let counter = |value: u64| move |outcome: &Outcome| assert_eq!(outcome.state.gpr[1], value);
    let with_counter = |name: &str, code: &[u8], ends: Ends, before: u64, after: u64| {
        at_the_edge(name, code, ends)
            .state(|state| state.gpr[1] = before)
            .also(counter(after))
    };
    // There HLT follows.
    let on = Halt(EDGE + 0xff3);
    let stack = |outcome: &Outcome| {
        // Aligned, then five slots and an error code.
        assert_eq!(pushed(outcome, 8, 4), crate::layout::STACK);
    };
    let cases = vec![
        with_counter("loop, taken", &[0xe2, 0x7f, 0xf4], general, 5, 5),
        with_counter("loop, not taken", &[0xe2, 0x7f, 0xf4], on, 1, 0),
        // ZF is clear.
        with_counter("loopne, taken", &[0xe0, 0x7f, 0xf4], general, 5, 5),
        with_counter("loope, not taken", &[0xe1, 0x7f, 0xf4], on, 5, 4),
        with_counter("jrcxz, taken", &[0xe3, 0x7f, 0xf4], general, 0, 0),
        at_the_edge("jne, taken", &[0x75, 0x7f], general),
        at_the_edge("jmp", &[0xeb, 0x7f], general),
        at_the_edge("call", &[0xe8, 0x7f, 0, 0, 0], general).also(stack),
    ];
    by_the_manual(cases, &[]);
}

/// The manual's listing looks at the target first; processors push first, and the fault of the push is
/// the one to be seen (the differential test found it so).
#[test]
fn a_call_faults_by_its_push_before_its_target() {
    let call = [0xe8, 0xfb, 0x1f, 0, 0];
    let cases = [
        (0x40_0010, Fault(PF, Some(6), CODE)),
        (0x7f00, Fault(GP, Some(0), CODE)),
    ]
    .map(|(rsp, ends)| {
        Case::new(
            "call beyond the limit",
            Start::UserCompatibility,
            &call,
            ends,
        )
        .state(|state| {
            state.segments.cs.limit = 0x7fff;
            state.segments.cs.attributes &= !0x8000;
            state.gpr[4] = rsp;
        })
        .also(move |outcome| assert_eq!(pushed(outcome, 8, 4), rsp))
    })
    .into();
    by_the_manual(
        cases,
        &[("call beyond", "its emulator looks at the target first")],
    );
}
