//! Task switches by exceptions, and those that fail.

use super::*;
use crate::layout::{GDT, IDT, STACK0, TSS, TSS2, sel};
use x86::rflags;

const SECOND: u64 = 0x7b00;
/// The top of the second task's stack.
const SECOND_STACK: u64 = STACK0 + 0x1000;

fn task_gate(vector: u64, case: Case) -> Case {
    let gate = 0x0000_8500_0000_0000 | u64::from(sel::TSS2) << 16;
    case.put(TSS2 + 32, &(SECOND as u32).to_le_bytes())
        .put(IDT + vector * 8, &gate.to_le_bytes())
}

fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let mut code = vec![opcode, 0, 0, 0, 0];
    code.extend(selector.to_le_bytes());
    code
}

#[test]
fn faults_by_a_task_gate_push_their_code_there() {
    let mut cases = Vec::new();
    for start in [Start::Protected32, Start::User32] {
        // mov ds, ax
        let case = Case::new("#GP by a task gate", start, &[0x8e, 0xd8], Halt(SECOND + 1))
            .state(|state| state.gpr[0] = sel::OUTSIDE.into())
            .also(|outcome| {
                let state = &outcome.state;
                assert_eq!(state.gpr[4], SECOND_STACK - 4);
                assert_eq!(word(outcome, SECOND_STACK - 4, 4), u64::from(sel::OUTSIDE));
                assert_ne!(state.rflags & rflags::NT, 0);
                assert_eq!(word(outcome, TSS2, 2), u64::from(sel::TSS), "link");
                assert_eq!(word(outcome, TSS + 32, 4), CODE, "the old task's EIP");
                assert_eq!(state.segments.tr.selector, sel::TSS2);
                assert_ne!(state.cr0 & 8, 0, "TS");
            });
        cases.push(task_gate(13, case));
    }
    by_the_manual(
        cases,
        &[(
            "by a task gate",
            "its exceptions take a task gate for another",
        )],
    );
}

#[test]
fn the_trap_bit_of_a_task() {
    let code = far(0xea, sel::TSS2);
    let case = Case::new("T bit", Start::Protected32, &code, Fault(1, None, SECOND))
        .put(TSS2 + 32, &(SECOND as u32).to_le_bytes())
        .put(TSS2 + 100, &[1])
        .also(|outcome| assert_eq!(outcome.state.dr6 & 0xe00f, 0x8000));
    by_the_manual(vec![case], &[("T bit", "no trap by the T bit")]);
}

#[test]
fn tasks_that_can_not_be_entered() {
    let jump = far(0xea, sel::TSS2);
    let limit: u64 = 0x0000_8900_3800_0066;
    let absent: u64 = 0x0000_0900_3800_0067;
    let invalid = Fault(TS, Some(sel::TSS2.into()), CODE);
    let missing = Fault(NP, Some(sel::TSS2.into()), CODE);
    let at = GDT + u64::from(sel::TSS2);
    let start = Start::Protected32;
    let mut cases = vec![
        Case::new("too short", start, &jump, invalid).put(at, &limit.to_le_bytes()),
        Case::new("absent", start, &jump, missing).put(at, &absent.to_le_bytes()),
    ];
    // The way back leads to a task that isn't busy.
    let back = Case::new("iret to an idle task", start, &[0xcf], invalid)
        .state(|state| state.rflags |= rflags::NT)
        .put(TSS, &sel::TSS2.to_le_bytes());
    cases.push(back);
    // There are no tasks in long mode.
    let nested = Case::new(
        "iret with NT",
        Start::Long,
        &[0xcf],
        Fault(GP, Some(0), CODE),
    );
    cases.push(nested.state(|state| state.rflags |= rflags::NT));
    by_the_manual(cases, &[]);
}

/// Parameters of a 16-bit gate are words.
#[test]
fn call_gate_of_16_bits_with_parameters() {
    let gate = 0x0000_e403_0060_0008_u64;
    // Code of 16 bits whose base is that of the handlers.
    let code16: u64 = 0x0000_9b02_0000_ffff;
    let target = HANDLERS + 9;
    let case = Case::new(
        "call gate of 16 bits",
        Start::User32,
        &far(0x9a, sel::GATE),
        Halt(target),
    )
    .put(GDT + u64::from(sel::GATE & !7), &gate.to_le_bytes())
    .put(GDT + u64::from(sel::CODE16), &code16.to_le_bytes())
    .state(|state| state.gpr[4] = 0x7f00)
    .put(0x7f00, &[1, 0, 2, 0, 3, 0])
    .also(|outcome| {
        let slots: [u64; 7] = std::array::from_fn(|slot| pushed(outcome, 2, slot));
        let (cs, ss) = (sel::USER_CODE32.into(), sel::USER_DATA32.into());
        assert_eq!(slots, [0x7007, cs, 1, 2, 3, 0x7f00, ss]);
    });
    by_the_manual(vec![case], &[]);
}
