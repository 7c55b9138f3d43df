//! The oracle itself: it is exact, and it says the same thing twice.

use std::time::Duration;

use differential::campaign::{self, Effort, MODES, Progress};
use differential::case::{Batch, Case, Executor, Mode, Patch, Program, State};
use differential::generate::Catalogue;
use differential::layout::{DATA_BYTES, WINDOWS};
use differential::minimise::Pair;
use differential::native::NativeCpu;

/// Runs `code` natively from `state` over zeroed memory.
fn run(mode: Mode, code: &[u8], state: &State) -> differential::case::Outcome {
    let batch = Batch {
        pattern: Box::new([0; DATA_BYTES]),
        programs: vec![Program::new(mode, 0x100, code).unwrap()],
        cases: vec![Case {
            program: 0,
            state: *state,
            patches: [Patch::EMPTY; 3],
        }],
    };
    let mut outcomes = Vec::new();
    NativeCpu::new()
        .unwrap()
        .run(&batch, &mut outcomes)
        .unwrap();
    outcomes[0]
}

#[test]
fn an_addition_with_its_flags() {
    let mut state = State::initial();
    state.gpr[0] = 0x7fff_ffff_ffff_ffff;
    state.gpr[3] = 1;
    let outcome = run(Mode::Long, &[0x48, 0x01, 0xd8], &state); // add %rbx,%rax
    assert_eq!(outcome.ending.vector, 3);
    assert_eq!(outcome.state.gpr[0], 0x8000_0000_0000_0000);
    assert_eq!(outcome.state.rflags & 0x8d5, 0x894, "OF SF AF PF");
    assert_eq!(outcome.state.rip, 0x1000_0104);
}

#[test]
fn a_store_and_a_fault() {
    let mut state = State::initial();
    state.gpr[0] = 0x1122_3344_5566_7788;
    state.gpr[7] = WINDOWS[1].raw() + 0x20;
    let outcome = run(Mode::Long, &[0x48, 0x89, 0x07], &state); // mov %rax,(%rdi)
    assert_eq!(outcome.memory[0x20..0x28], state.gpr[0].to_le_bytes());

    state.gpr[7] = WINDOWS[1].raw() + 0x2ffc; // into the read-only page
    let outcome = run(Mode::Long, &[0x48, 0x89, 0x07], &state);
    assert_eq!(outcome.ending.vector, 14);
    assert_eq!(outcome.ending.error_code, 7, "present, write, user");
    assert_eq!(outcome.ending.cr2, WINDOWS[1].raw() + 0x3000);
    assert_eq!(outcome.state.rip, 0x1000_0100);
}

#[test]
fn code_without_end_is_stopped() {
    let outcome = run(Mode::Long, &[0xeb, 0xfe], &State::initial());
    assert!(!outcome.ending.is_exception());
}

#[test]
fn thirty_two_bit_code_runs_too() {
    let mut state = State::initial();
    state.gpr[0] = 0x0f;
    let outcome = run(Mode::Compat32, &[0x37], &state); // aaa
    assert_eq!(outcome.state.gpr[0], 0x105);
}

#[test]
fn every_form_gives_the_same_result_twice() {
    let (mut first, mut second) = (NativeCpu::new().unwrap(), NativeCpu::new().unwrap());
    for mode in MODES {
        let mut catalogue = Catalogue::new(mode);
        let effort = Effort {
            seed: 7,
            encodings: 1,
            states: 4,
            time: Duration::ZERO,
            kept: 3,
            progress: Progress::Quiet,
        };
        let mut pair = Pair {
            native: &mut first,
            subject: &mut second,
        };
        let tally = campaign::single_instructions(&mut catalogue, effort, &mut pair).unwrap();
        for divergence in &tally.divergences {
            println!("{divergence}");
        }
        assert!(tally.diverging.is_empty(), "{:?}", tally.diverging);
        assert!(catalogue.forms.len() > 1800, "{}", catalogue.forms.len());
        assert!(tally.cases > 7000);
    }
}
