//! Far jumps, calls and returns; call gates.

use x86::vector;

use super::machine::{RSP0, sel};
use super::{Machine, general};
use crate::system::{Mode, Next};

fn far(opcode: u8, offset: u32, selector: u16) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}

const JMP: u8 = 0xea;
const CALL: u8 = 0x9a;
const RETF: &[u8] = &[0xcb];

#[test]
fn real_mode_call_and_return() {
    let mut m = Machine::real();
    assert_eq!(m.run(&[CALL, 0x34, 0x12, 0x00, 0x40]), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.segments.cs.base), (0x1234, 0x40000));
    assert_eq!(m.stack::<2>(2), [0x7005, 0]);
    assert_eq!(m.run(RETF), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.segments.cs.base, m.state.gpr[4]),
        (0x7005, 0, 0x8000)
    );
}

#[test]
fn jump_into_a_16bit_segment_and_into_long_mode() {
    let mut m = Machine::protected();
    assert_eq!(m.run(&far(JMP, 0x100, sel::CODE16)), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.ip_mask()), (0x100, 0xffff));
    let mut m = Machine::long();
    m.state.segments.cs.attributes = 0xc09b; // compatibility mode
    assert_eq!(m.run(&far(JMP, 0x100, sel::CODE64)), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.mode()), (0x100, Mode::Long));
}

#[test]
fn code_segments_are_checked() {
    let mut m = Machine::protected();
    m.faults(&far(JMP, 0, 0), vector::GP, Some(0));
    for wrong in [sel::DATA32, sel::USER_CODE32 & !3, 0x108, sel::CODE32 | 3] {
        m.faults(&far(JMP, 0, wrong), vector::GP, Some(u32::from(wrong & !3)));
    }
    m.faults(&far(JMP, 0x1_0000, sel::CODE16), vector::GP, Some(0));
    m.put_descriptor(sel::CODE16, 0x0000_1b00_0000_ffff);
    m.faults(
        &far(JMP, 0, sel::CODE16),
        vector::NP,
        Some(u32::from(sel::CODE16)),
    );
    let mut m = Machine::user();
    assert_eq!(m.run(&far(JMP, 0x100, sel::CONFORMING)), Ok(Next::Jump));
    assert_eq!(
        (m.state.segments.cs.selector, m.state.cpl()),
        (sel::CONFORMING | 3, 3)
    );
}

#[test]
fn call_gate_to_the_same_level() {
    let mut m = Machine::protected();
    assert_eq!(m.run(&far(CALL, 0xdead, sel::CALL_GATE)), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.gpr[4]), (0x5000, 0x7ff8));
    assert_eq!(m.stack::<2>(4), [0x7007, u64::from(sel::CODE32)]);
}

#[test]
fn call_gate_to_an_inner_level_and_back() {
    let mut m = Machine::user();
    m.inner_stack32();
    m.faults(
        &far(CALL, 0, sel::CALL_GATE),
        vector::GP,
        Some(u32::from(sel::CALL_GATE)),
    );
    m.faults(
        &far(JMP, 0, sel::USER_CALL_GATE),
        vector::GP,
        Some(u32::from(sel::CODE32)),
    );
    m.put(0x8000, &0x1111_1111u32.to_le_bytes());
    m.put(0x8004, &0x2222_2222u32.to_le_bytes());
    assert_eq!(m.run(&far(CALL, 0, sel::USER_CALL_GATE)), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.cpl(), m.state.gpr[4]),
        (0x5000, 0, RSP0 - 24)
    );
    assert_eq!(
        m.stack::<6>(4),
        [
            0x7007,
            u64::from(sel::USER_CODE32),
            0x1111_1111,
            0x2222_2222,
            0x8000,
            u64::from(sel::USER_DATA32),
        ]
    );
    m.state.segments.ds.attributes = 0xc093; // a segment of level 0
    assert_eq!(m.run(&[0xca, 8, 0]), Ok(Next::Jump)); // retf 8
    assert_eq!(
        (m.state.rip, m.state.cpl(), m.state.gpr[4]),
        (0x7007, 3, 0x8008)
    );
    assert!(m.state.segments.ds.unusable && !m.state.segments.es.unusable);
}

#[test]
fn inner_stack_faults_name_the_tss_or_the_stack() {
    let mut m = Machine::user();
    m.faults(&far(CALL, 0, sel::USER_CALL_GATE), vector::TS, Some(0)); // SS0 is null
    m.inner_stack32();
    m.put(0x3008, &sel::USER_DATA32.to_le_bytes());
    let named = u32::from(sel::USER_DATA32 & !3);
    m.faults(&far(CALL, 0, sel::USER_CALL_GATE), vector::TS, Some(named));
    m.inner_stack32();
    m.state.segments.tr.limit = 8;
    m.faults(
        &far(CALL, 0, sel::USER_CALL_GATE),
        vector::TS,
        Some(u32::from(sel::TSS)),
    );
}

#[test]
fn call_gate_in_long_mode() {
    let mut m = Machine::long_user();
    m.inner_stack64();
    m.put_descriptor(sel::USER_CALL_GATE, 0x0000_ec00_0028_5000);
    m.put_descriptor(sel::USER_CALL_GATE + 8, 0x0000_0000_ffff_8000);
    m.state.gpr[3] = 0x6000;
    m.put(0x6004, &sel::USER_CALL_GATE.to_le_bytes());
    assert_eq!(m.run(&[0xff, 0x1b]), Ok(Next::Jump)); // call far dword [rbx]
    assert_eq!((m.state.rip, m.state.cpl()), (0xffff_8000_0000_5000, 0));
    assert_eq!(m.state.segments.ss.selector, 0);
    assert_eq!(
        m.stack::<4>(8),
        [
            0x7002,
            u64::from(sel::USER_CODE64),
            0x8000,
            u64::from(sel::USER_DATA32),
        ]
    );
    assert_eq!(m.run(&[0x48, 0xcb]), Ok(Next::Jump)); // retfq
    assert_eq!(
        (m.state.rip, m.state.cpl(), m.state.gpr[4]),
        (0x7002, 3, 0x8000)
    );
}

#[test]
fn returns_go_outward_only() {
    let mut m = Machine::user();
    m.put(0x8000, &0x100u32.to_le_bytes());
    m.put(0x8004, &u32::from(sel::CODE32).to_le_bytes());
    m.faults(RETF, vector::GP, Some(u32::from(sel::CODE32)));
    m.put(0x8004, &0u32.to_le_bytes());
    assert_eq!(m.run(RETF), general(0));
}
