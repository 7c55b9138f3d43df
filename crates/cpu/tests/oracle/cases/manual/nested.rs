//! Faults while another is delivered.

use super::*;
use crate::layout::{IDT, sel};

/// Takes the gates of these vectors away.
fn absent(mut case: Case, vectors: &[u64]) -> Case {
    let size = if case.guest.state.msrs.efer >> 10 & 1 == 0 {
        8
    } else {
        16
    };
    for vector in vectors {
        case.guest.put(IDT + vector * size + 5, &[0x6e]);
    }
    case
}

/// mov ds, ax
const MOV_DS: &[u8] = &[0x8e, 0xd8];
/// xor ecx, ecx; div ecx
const DIVIDE: &[u8] = &[0x31, 0xc9, 0xf7, 0xf1];
/// mov eax, [rbx]
const READ: &[u8] = &[0x8b, 0x03];

const STARTS: [Start; 6] = [
    Start::Protected32,
    Start::User32,
    Start::Compatibility,
    Start::UserCompatibility,
    Start::Long,
    Start::UserLong,
];

#[test]
fn benign_first() {
    let mut cases = Vec::new();
    for start in STARTS {
        // The index of the gate, the bit for the IDT, and the bit for an event from outside of the
        // program, which INT n and its like are not.
        let ud = Case::new(
            "ud2, absent",
            start,
            &[0x0f, 0x0b],
            Fault(NP, Some(0x33), CODE),
        );
        cases.push(absent(ud, &[6]));
        let int3 = Case::new("int3, absent", start, &[0xcc], Fault(NP, Some(0x1a), CODE));
        cases.push(absent(int3, &[3]));
        let int = Case::new(
            "int, absent",
            start,
            &[0xcd, 0x80],
            Fault(NP, Some(0x402), CODE),
        );
        cases.push(absent(int, &[0x80]));
    }
    by_the_manual(
        cases,
        &[("absent", "#DF behind an event that is no contributory one")],
    );
}

#[test]
fn contributory_first() {
    let mut cases = Vec::new();
    for start in STARTS {
        let double = Fault(DF, Some(0), CODE);
        let with_selector = |name: &str, selector: u16| {
            let case = Case::new(name, start, MOV_DS, double);
            case.state(|state| state.gpr[0] = selector.into())
        };
        cases.push(absent(with_selector("#GP, absent", sel::OUTSIDE), &[13]));
        cases.push(absent(
            with_selector("#NP, absent", sel::ABSENT_DATA | 3),
            &[11],
        ));
        let divide = Case::new("#DE, absent", start, DIVIDE, Fault(DF, Some(0), CODE + 2));
        cases.push(absent(divide, &[0]));
        let mut triple = with_selector("#GP, #DF, absent", sel::OUTSIDE);
        triple.ends = Shutdown;
        cases.push(absent(triple, &[8, 13]));
    }
    by_the_manual(cases, &[]);
}

#[test]
fn page_faults_first() {
    let mut cases = Vec::new();
    for start in [Start::Compatibility, Start::Long, Start::UserLong] {
        let unmapped = |name: &str, ends: Ends| {
            Case::new(name, start, READ, ends).state(|state| state.gpr[3] = 0x40_0000)
        };
        let cr2 = |outcome: &Outcome| assert_eq!(outcome.state.cr2, 0x40_0000);
        let double = unmapped("#PF, absent", Fault(DF, Some(0), CODE)).also(cr2);
        cases.push(absent(double, &[14]));
        // The handler of #PF lies where nothing is: #PF again.
        let again = unmapped("#PF, IDT unmapped", Shutdown);
        cases.push(again.state(|state| state.idtr.base = 0x40_0000));
    }
    by_the_manual(cases, &[]);
}

/// A page fault behind a contributory one is not a double fault.
#[test]
fn a_page_fault_in_the_delivery_of_another_fault() {
    let mut cases = Vec::new();
    for start in [Start::Compatibility, Start::Long] {
        // #GP by a stack of its own that isn't mapped; #PF comes by the present one.
        let mut case = Case::new(
            "#GP, stack unmapped",
            start,
            MOV_DS,
            Fault(PF, Some(2), CODE),
        )
        .state(|state| state.gpr[0] = sel::OUTSIDE.into())
        .put(IDT + 13 * 16 + 4, &[1])
        .also(|outcome| assert_eq!(outcome.state.cr2, 0x40_0000 - 8));
        case.guest
            .put(crate::layout::TSS + 36, &0x40_0000u64.to_le_bytes());
        // Between 2 and 4 MiB nothing is mapped.
        cases.push(case);
    }
    by_the_manual(
        cases,
        &[("stack unmapped", "#DF, as if the #PF had come first")],
    );
}

#[test]
fn double_faults_by_a_stack_of_their_own() {
    let mut cases = Vec::new();
    for start in [Start::Long, Start::UserLong, Start::UserCompatibility] {
        // In long mode vector 8 has IST 1.
        let case = Case::new("#DF", start, MOV_DS, Fault(DF, Some(0), CODE))
            .state(|state| state.gpr[0] = sel::OUTSIDE.into())
            .also(|outcome| {
                let top = outcome.state.gpr[4];
                assert_eq!(top, crate::layout::IST1 - 48, "error code and five slots");
            });
        cases.push(absent(case, &[13]));
    }
    by_the_manual(cases, &[]);
}
