//! Flags that a fault shows though the code is about to replace them: what the seeds of whole programs
//! found. Each case runs several times, as the TLB knows more each time.

use differential::case::{Batch, Case, Executor, Mode, Patch, Program, State};
use differential::guest::{GuestCpu, Translation};
use differential::layout::DATA_BYTES;
use differential::native::NativeCpu;

const TEST: [u8; 5] = [0xa9, 0, 1, 0, 0]; // test $0x100,%eax
const ADD: [u8; 3] = [0x48, 0x01, 0xc0]; // add %rax,%rax
const DEC: [u8; 3] = [0x49, 0xff, 0xcf]; // dec %r15
const LOAD: [u8; 4] = [0x49, 0x8b, 0x46, 0x20]; // mov 0x20(%r14),%rax
/// Replaces some flags, after which nobody but the handler sees the others.
const SOME: [u8; 4] = [0x66, 0x41, 0xff, 0xc5]; // inc %r13w
const ROTATE: [u8; 5] = [0x66, 0x41, 0xd1, 0x4e, 0x30]; // rorw 0x30(%r14)
const CARRY: [u8; 4] = [0x49, 0xff, 0xcf, 0xf9]; // dec %r15; stc

/// Both sides end by this vector with the same flags. `base` is in r14.
fn same(mode: Mode, base: u64, parts: &[&[u8]], vector: u32, change: impl FnOnce(&mut State)) {
    let code = parts.concat();
    let mut state = State::initial();
    (state.gpr[14], state.gpr[15], state.gpr[4]) = (base, 1, 0x2000_1090);
    state.gpr[3] = base;
    change(&mut state);
    let case = Case {
        program: 0,
        state,
        patches: [Patch::EMPTY; 3],
    };
    let batch = Batch {
        pattern: Box::new([0; DATA_BYTES]),
        programs: vec![Program::new(mode, 0x228a, &code).unwrap()],
        cases: vec![case; 4],
    };
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    NativeCpu::new()
        .unwrap()
        .run(&batch, &mut expected)
        .unwrap();
    let mut cpu = GuestCpu::new(Translation::Blocks).unwrap();
    cpu.run(&batch, &mut found).unwrap();
    for (run, (e, f)) in expected.iter().zip(&found).enumerate() {
        assert_eq!((e.ending.vector, f.ending.vector), (vector, vector));
        assert_eq!(e.state.rip, f.state.rip);
        assert_eq!(e.state.rflags, f.state.rflags, "run {run} of {code:02x?}");
    }
}

const BASE: u64 = 0x5a5a_4000_2100;

#[test]
fn a_table_look_up() {
    let xlat = [0x64, 0xd7]; // xlat %fs:(%rbx)
    let far = |state: &mut State| state.gpr[3] = 0xbb4a_4663_a018_61d7;
    same(Mode::Long, BASE, &[&DEC, &xlat, &TEST], 13, far);
    let absent = |state: &mut State| state.gpr[3] = 0x7000_0000;
    same(Mode::Long, BASE, &[&ADD, &xlat, &TEST], 14, absent);
}

#[test]
fn a_wait_for_the_x87() {
    let pending = |state: &mut State| {
        state.extended.set_word(0, 0xc50);
        state.extended.set_word(2, 0xf08d);
    };
    same(
        Mode::Long,
        BASE,
        &[&DEC, &LOAD, &SOME, &[0x9b], &TEST],
        16,
        pending,
    );
}

#[test]
fn a_hint_with_a_register() {
    let hint = [0x66, 0x45, 0x0f, 0x0d, 0xef]; // nop %r13w,%r15w
    if !std::arch::is_x86_feature_detected!("sse4a") {
        eprintln!("skipped: not #UD on other CPUs than AMD's");
        return;
    }
    same(
        Mode::Long,
        BASE,
        &[&CARRY, &LOAD, &ROTATE, &hint, &TEST],
        6,
        |_| {},
    );
}

#[test]
fn a_division() {
    let div = [0x48, 0xf7, 0xf1]; // div %rcx
    same(
        Mode::Long,
        BASE,
        &[&DEC, &LOAD, &SOME, &div, &TEST],
        0,
        |_| {},
    );
}

#[test]
fn accesses_under_one_check_across_a_page() {
    let first = [0xc4, 0xc2, 0x79, 0x47, 0x86, 0x20, 0xff, 0xff, 0xff]; // vpsllvd -0xe0(%r14),..
    let second = [0xc4, 0xc2, 0x41, 0x00, 0x8e, 0xe0, 0xfd, 0xff, 0xff]; // vpshufb -0x220(%r14),..
    let faults = [0xc4, 0xa2, 0x7d, 0x32, 0x34, 0x85, 0xa1, 0xff, 0xff, 0xff]; // vpmovzxbq -0x5f
    let r10 = [0x4d, 0x01, 0xd2]; // add %r10,%r10: can't be done again
    for setter in [&DEC, &r10, &ADD] {
        let parts: [&[u8]; 5] = [setter, &first, &second, &faults, &TEST];
        same(Mode::Long, BASE, &parts, 14, |_| {});
        same(Mode::Long, BASE + 0x300, &parts, 14, |_| {});
    }
}
