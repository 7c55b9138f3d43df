//! Fast system calls.

use x86::rflags;
use x86::vector;

use super::Machine;
use crate::system::{Mode, Next};

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];

fn prepared() -> Machine {
    let mut m = Machine::long_user();
    m.state.msrs.star = 0x0023_0028 << 32;
    m.state.msrs.lstar = 0xffff_8000_0000_1000;
    m.state.msrs.sfmask = rflags::IF | rflags::DF;
    m
}

#[test]
fn there_and_back() {
    let mut m = prepared();
    m.state.rflags |= rflags::IF | rflags::ZF;
    assert_eq!(m.run(SYSCALL), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.cpl(), m.state.rflags),
        (0xffff_8000_0000_1000, 0, rflags::ZF | 2)
    );
    assert_eq!(
        (m.state.gpr[1], m.state.gpr[11]),
        (0x7002, rflags::IF | rflags::ZF | 2)
    );
    let segments = &m.state.segments;
    assert_eq!(
        (segments.cs.selector, segments.cs.attributes),
        (0x28, 0xa09b)
    );
    assert_eq!(
        (segments.ss.selector, segments.ss.attributes),
        (0x30, 0xc093)
    );
    assert_eq!(m.run(SYSRETQ), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.cpl()), (0x7002, 3));
    assert_eq!(m.state.rflags, rflags::IF | rflags::ZF | 2);
    let segments = &m.state.segments;
    assert_eq!(
        (segments.cs.selector, segments.cs.attributes),
        (0x33, 0xa0fb)
    );
    assert_eq!(
        (segments.ss.selector, segments.ss.attributes),
        (0x2b, 0xc0f3)
    );
}

#[test]
fn back_to_32bit_code() {
    let mut m = prepared();
    m.run(SYSCALL).unwrap();
    m.state.gpr[1] = 0x1_2345_6789;
    assert_eq!(m.run(&[0x0f, 0x07]), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.mode()),
        (0x2345_6789, Mode::Compatibility)
    );
    assert_eq!(m.state.segments.cs.selector, 0x23);
}

#[test]
fn faults() {
    let mut m = prepared();
    m.faults(SYSRETQ, vector::GP, Some(0)); // CPL 3
    m.state.msrs.efer &= !1;
    m.faults(SYSCALL, vector::UD, None);
    let mut m = prepared();
    m.run(SYSCALL).unwrap();
    m.state.gpr[1] = 1 << 47;
    m.faults(SYSRETQ, vector::GP, Some(0));
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = Machine::user();
    m.faults(&[0x0f, 0x34], vector::GP, Some(0)); // the MSR is null
    m.state.msrs.sysenter_cs = 0x8;
    m.state.msrs.sysenter_esp = 0x9000;
    m.state.msrs.sysenter_eip = 0x5000;
    m.state.rflags |= rflags::IF;
    assert_eq!(m.run(&[0x0f, 0x34]), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.gpr[4], m.state.cpl()),
        (0x5000, 0x9000, 0)
    );
    assert_eq!((m.state.rflags, m.state.segments.ss.selector), (2, 0x10));
    m.state.gpr[2] = 0x7002;
    m.state.gpr[1] = 0x8000;
    assert_eq!(m.run(&[0x0f, 0x35]), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.gpr[4], m.state.cpl()),
        (0x7002, 0x8000, 3)
    );
    assert_eq!(m.state.segments.cs.selector, 0x1b);
}
