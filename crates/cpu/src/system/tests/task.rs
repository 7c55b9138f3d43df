//! Task switches.

use x86::control::Cr0;
use x86::rflags;
use x86::vector;

use super::Machine;
use super::machine::{IDT, TSS, TSS2, sel};
use crate::system::{Effects, Event, Mode, Next};
use crate::{Exception, system::Abort};

/// The second TSS: a task that is at 0x5000 with EAX 0x11 to EDI 0x18.
fn second_task(m: &mut Machine) {
    let put = |m: &mut Machine, offset: u64, value: u64| {
        m.put(TSS2 + offset, &(value as u32).to_le_bytes());
    };
    put(m, 32, 0x5000);
    put(m, 36, rflags::ZF | 2);
    for n in 0..8 {
        put(m, 40 + 4 * n, 0x11 + n);
    }
    put(m, 56, 0x9000);
    for (n, selector) in [sel::DATA32, sel::CODE32, sel::DATA32, sel::DATA32, 0, 0]
        .into_iter()
        .enumerate()
    {
        put(m, 72 + 4 * n as u64, selector.into());
    }
    m.put_descriptor(sel::TSS, 0x0000_8b00_3000_0067);
}

fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let mut bytes = vec![opcode, 0, 0, 0, 0];
    bytes.extend(selector.to_le_bytes());
    bytes
}

#[test]
fn call_and_return() {
    let mut m = Machine::protected();
    second_task(&mut m);
    m.state.gpr[0] = 0xaaaa;
    assert_eq!(m.run(&far(0x9a, sel::TSS2)), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.gpr[0], m.state.gpr[4]),
        (0x5000, 0x11, 0x9000)
    );
    assert_eq!(m.state.rflags, rflags::ZF | rflags::NT | 2);
    assert_eq!(m.state.segments.tr.selector, sel::TSS2);
    assert_eq!(m.descriptor(sel::TSS2) >> 40 & 0xf, 11, "busy");
    assert_eq!(m.descriptor(sel::TSS) >> 40 & 0xf, 11, "still busy");
    assert_eq!(m.get(TSS2, 2), u64::from(sel::TSS));
    assert_eq!((m.get32(TSS + 32), m.get32(TSS + 40)), (0x7007, 0xaaaa));
    assert!(m.state.cr0_has(Cr0::TS) && m.effects.contains(Effects::TASK_SWITCHED));
    assert!(m.state.segments.fs.unusable);
    assert_eq!(m.run(&[0xcf]), Ok(Next::Jump)); // iret
    assert_eq!((m.state.rip, m.state.gpr[0]), (0x7007, 0xaaaa));
    assert_eq!(m.descriptor(sel::TSS2) >> 40 & 0xf, 9, "available again");
    assert_eq!(m.get32(TSS2 + 36) & rflags::NT, 0);
}

#[test]
fn jump_through_a_task_gate() {
    let mut m = Machine::protected();
    second_task(&mut m);
    assert_eq!(m.run(&far(0xea, sel::TASK_GATE)), Ok(Next::Jump));
    assert_eq!(m.state.rflags, rflags::ZF | 2);
    assert_eq!(m.descriptor(sel::TSS) >> 40 & 0xf, 9);
    m.faults(
        &far(0xea, sel::TSS2),
        vector::GP,
        Some(u32::from(sel::TSS2)),
    ); // busy
}

#[test]
fn double_fault_by_a_task_gate() {
    let mut m = Machine::protected();
    second_task(&mut m);
    let gate = 0x0000_8500_0000_0000 | u64::from(sel::TSS2) << 16;
    m.put(IDT + 8 * 8, &gate.to_le_bytes());
    let fault = Exception::with_code(vector::GP, 0);
    assert_eq!(m.deliver(Event::Exception(fault)), Ok(()));
    assert_eq!((m.state.rip, m.state.gpr[4]), (0x5000, 0x8ffc));
    assert_eq!(m.stack::<1>(4), [0]);
    assert_eq!(m.get32(TSS + 32), 0x7000);
}

#[test]
fn a_fault_past_the_commit_point_is_the_new_tasks() {
    let mut m = Machine::protected();
    second_task(&mut m);
    m.put(TSS2 + 80, &u32::from(sel::READ_ONLY).to_le_bytes()); // SS
    let fault = Exception::with_code(vector::TS, u32::from(sel::READ_ONLY));
    assert_eq!(m.run(&far(0xea, sel::TSS2)), Err(Abort::Exception(fault)));
    assert_eq!(
        (m.state.rip, m.state.segments.tr.selector),
        (0x5000, sel::TSS2)
    );
    assert!(m.state.segments.ss.unusable);
}

#[test]
fn into_virtual_8086_mode() {
    let mut m = Machine::protected();
    second_task(&mut m);
    m.put(TSS2 + 36, &((rflags::VM | 2) as u32).to_le_bytes());
    m.put(TSS2 + 76, &0x2000u32.to_le_bytes());
    assert_eq!(m.run(&far(0xea, sel::TSS2)), Ok(Next::Jump));
    assert_eq!(
        (m.state.mode(), m.state.segments.cs.base),
        (Mode::Virtual8086, 0x20000)
    );
}

#[test]
fn between_16bit_tasks() {
    let mut m = Machine::protected();
    m.put_descriptor(sel::TSS2, 0x0000_8100_3200_002b);
    m.put_descriptor(sel::TSS, 0x0000_8300_3000_002b);
    m.state.segments.tr.attributes = 0x83;
    m.state.segments.tr.limit = 0x2b;
    let words = [0x5000, 2, 0x11, 0x12, 0x13, 0x14, 0x9000, 0x16, 0x17, 0x18];
    for (n, word) in words.into_iter().enumerate() {
        m.put(TSS2 + 14 + 2 * n as u64, &(word as u16).to_le_bytes());
    }
    for (n, selector) in [sel::DATA32, sel::CODE16, sel::DATA16, sel::DATA32]
        .into_iter()
        .enumerate()
    {
        m.put(TSS2 + 34 + 2 * n as u64, &selector.to_le_bytes());
    }
    m.state.gpr[0] = 0x1234_aaaa;
    assert_eq!(m.run(&far(0xea, sel::TSS2)), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.gpr[4] & 0xffff), (0x5000, 0x9000));
    assert_eq!(m.state.gpr[0] & 0xffff, 0x11);
    assert_eq!((m.get(TSS + 14, 2), m.get(TSS + 18, 2)), (0x7007, 0xaaaa));
}
