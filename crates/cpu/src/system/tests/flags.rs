//! RFLAGS and who may change what of it.

use x86::control::Cr4;
use x86::rflags;
use x86::vector;

use super::Machine;
use crate::system::{Effects, Next};

#[test]
fn interrupt_flag_by_level() {
    let mut m = Machine::user();
    m.faults(&[0xfa], vector::GP, Some(0));
    m.faults(&[0xfb], vector::GP, Some(0));
    m.state.rflags |= rflags::IOPL;
    assert_eq!(m.run(&[0xfb]), Ok(Next::Sequential));
    assert!(m.state.flags_have(rflags::IF) && m.state.events.sti_shadow);
    assert!(m.effects.contains(Effects::SHADOW | Effects::EVENTS));
    m.state.events.sti_shadow = false;
    assert_eq!(m.run(&[0xfb]), Ok(Next::Sequential));
    assert!(!m.state.events.sti_shadow, "already enabled: no shadow");
    assert_eq!(m.run(&[0xfa]), Ok(Next::Sequential));
    assert!(!m.state.flags_have(rflags::IF));
}

#[test]
fn protected_virtual_interrupts() {
    let mut m = Machine::user();
    m.state.cr4 = Cr4::PVI.bits();
    assert_eq!(m.run(&[0xfb]), Ok(Next::Sequential));
    assert_eq!(m.state.rflags, rflags::VIF | 2);
    m.state.rflags |= rflags::VIP;
    m.faults(&[0xfb], vector::GP, Some(0));
    assert_eq!(m.run(&[0xfa]), Ok(Next::Sequential));
    assert!(!m.state.flags_have(rflags::VIF));
}

#[test]
fn push_and_pop() {
    let mut m = Machine::protected();
    m.state.rflags = rflags::RF | rflags::CF | rflags::AC | 2;
    assert_eq!(m.run(&[0x9c]), Ok(Next::Sequential));
    assert_eq!(m.stack::<1>(4), [rflags::CF | rflags::AC | 2]);
    m.put(0x7ffc, &0xffff_ffffu32.to_le_bytes());
    assert_eq!(m.run(&[0x9d]), Ok(Next::Sequential));
    let unaffected = rflags::VM | rflags::RF | rflags::VIF | rflags::VIP;
    assert_eq!(m.state.rflags, rflags::ALL & !unaffected | 2);
    assert!(m.effects.contains(Effects::INTERRUPTS | Effects::DEBUG));
    let mut m = Machine::user();
    m.put(0x8000, &0xffff_ffffu32.to_le_bytes());
    assert_eq!(m.run(&[0x9d]), Ok(Next::Sequential));
    let unaffected = unaffected | rflags::IF | rflags::IOPL;
    assert_eq!(m.state.rflags, rflags::ALL & !unaffected | 2);
}

#[test]
fn virtual_8086_extensions() {
    let mut m = Machine::virtual8086();
    m.faults(&[0x9c], vector::GP, Some(0));
    m.state.cr4 = Cr4::VME.bits();
    m.state.rflags |= rflags::VIF;
    assert_eq!(m.run(&[0x9c]), Ok(Next::Sequential));
    assert_eq!(m.stack::<1>(2), [rflags::IF | rflags::IOPL | 2]);
    m.put(0x7ffe, &(rflags::CF as u16).to_le_bytes());
    assert_eq!(m.run(&[0x9d]), Ok(Next::Sequential));
    assert_eq!(m.state.rflags, rflags::VM | rflags::CF | 2);
    m.put(0x8000, &(rflags::TF as u16).to_le_bytes());
    m.faults(&[0x9d], vector::GP, Some(0));
    m.faults(&[0x66, 0x9c], vector::GP, Some(0));
}

#[test]
fn access_check_flag() {
    let mut m = Machine::long();
    assert_eq!(m.run(&[0x0f, 0x01, 0xcb]), Ok(Next::Sequential));
    assert!(m.state.flags_have(rflags::AC) && m.effects.contains(Effects::ACCESS_RIGHTS));
    assert_eq!(m.run(&[0x0f, 0x01, 0xca]), Ok(Next::Sequential));
    assert!(!m.state.flags_have(rflags::AC));
    Machine::long_user().faults(&[0x0f, 0x01, 0xcb], vector::UD, None);
}
