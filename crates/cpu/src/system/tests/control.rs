//! Control registers.

use x86::control::{Cr0, Cr4, Efer};
use x86::vector;

use super::{Machine, general};
use crate::system::{Effects, Flush, Mode, Next};

const MOV_CR0_EAX: &[u8] = &[0x0f, 0x22, 0xc0];
const MOV_CR3_EAX: &[u8] = &[0x0f, 0x22, 0xd8];
const MOV_CR4_EAX: &[u8] = &[0x0f, 0x22, 0xe0];

#[test]
fn protected_mode_begins_with_the_segments_as_they_are() {
    let mut m = Machine::real();
    m.state.gpr[0] = 1;
    assert_eq!(m.run(MOV_CR0_EAX), Ok(Next::Sequential));
    assert_eq!(m.state.mode(), Mode::Protected);
    assert_eq!(m.state.cr0, (Cr0::PE | Cr0::ET).bits());
    assert_eq!(m.state.segments.cs.attributes, 0x93);
    assert!(m.effects.contains(Effects::MODE));
}

#[test]
fn illegal_combinations_of_cr0() {
    for value in [1 << 31, 1 << 29 | 1] {
        let mut m = Machine::protected();
        m.state.gpr[0] = value;
        m.faults(MOV_CR0_EAX, vector::GP, Some(0));
    }
    let mut m = Machine::long();
    m.state.gpr[0] = m.state.cr0 | 1 << 32;
    m.faults(MOV_CR0_EAX, vector::GP, Some(0));
    m.state.gpr[0] = m.state.cr0 & !Cr0::PG.bits();
    m.faults(MOV_CR0_EAX, vector::GP, Some(0));
}

#[test]
fn long_mode_begins_with_paging() {
    let mut m = Machine::protected();
    m.state.msrs.efer = Efer::LME.bits();
    m.state.gpr[0] = m.state.cr0 | Cr0::PG.bits();
    m.faults(MOV_CR0_EAX, vector::GP, Some(0)); // no PAE
    m.state.cr4 = Cr4::PAE.bits();
    assert_eq!(m.run(MOV_CR0_EAX), Ok(Next::Sequential));
    assert_eq!(m.state.msrs.efer, (Efer::LME | Efer::LMA).bits());
    assert_eq!(m.state.mode(), Mode::Compatibility);
    assert_eq!(m.memory.flushes, [Flush::All]);
    m.state.gpr[0] &= !Cr0::PG.bits();
    assert_eq!(m.run(MOV_CR0_EAX), Ok(Next::Sequential));
    assert_eq!(m.state.msrs.efer, Efer::LME.bits());
}

#[test]
fn pae_paging_loads_checked_pdptes() {
    let mut m = Machine::protected();
    m.state.cr4 = Cr4::PAE.bits();
    m.state.cr3 = 0x6020;
    m.put(0x6020, &0x5001u64.to_le_bytes());
    m.put(0x6038, &0x5003u64.to_le_bytes());
    m.state.gpr[0] = m.state.cr0 | Cr0::PG.bits();
    m.faults(MOV_CR0_EAX, vector::GP, Some(0)); // the fourth has a reserved bit
    m.put(0x6038, &0x5002u64.to_le_bytes()); // not present: nothing is reserved
    assert_eq!(m.run(MOV_CR0_EAX), Ok(Next::Sequential));
    assert_eq!(m.state.pdptrs, [0x5001, 0, 0, 0x5002]);
}

#[test]
fn cr3_with_process_contexts() {
    let mut m = Machine::long();
    m.state.gpr[0] = 1 << 63 | 0x5001;
    m.faults(MOV_CR3_EAX, vector::GP, Some(0));
    m.state.cr4 |= Cr4::PCIDE.bits();
    assert_eq!(m.run(MOV_CR3_EAX), Ok(Next::Sequential));
    assert_eq!(m.state.cr3, 0x5001);
    assert_eq!(m.memory.flushes, []);
    m.state.gpr[0] = 0x6002;
    assert_eq!(m.run(MOV_CR3_EAX), Ok(Next::Sequential));
    assert_eq!(m.memory.flushes, [Flush::CurrentPcid]);
    assert_eq!(m.memory.paging_changes, 2);
    m.state.gpr[0] = 1 << 40;
    m.faults(MOV_CR3_EAX, vector::GP, Some(0));
}

#[test]
fn cr4_reserved_bits_and_long_mode_rules() {
    let mut m = Machine::long();
    let pae = Cr4::PAE.bits();
    for value in [0, pae | 1 << 13, pae | 1 << 40, pae | Cr4::LA57.bits()] {
        m.state.gpr[0] = value;
        m.faults(MOV_CR4_EAX, vector::GP, Some(0));
    }
    m.state.cr3 = 0x5001;
    m.state.gpr[0] = pae | Cr4::PCIDE.bits();
    m.faults(MOV_CR4_EAX, vector::GP, Some(0)); // PCID of CR3 must be 0
    m.state.cr3 = 0x5000;
    assert_eq!(m.run(MOV_CR4_EAX), Ok(Next::Sequential));
    assert_eq!(m.memory.flushes, []);
    m.state.gpr[0] = pae | Cr4::PGE.bits();
    assert_eq!(m.run(MOV_CR4_EAX), Ok(Next::Sequential));
    assert_eq!(m.memory.flushes, [Flush::All]);
}

#[test]
fn user_code_reaches_no_control_register() {
    let mut m = Machine::user();
    m.faults(MOV_CR0_EAX, vector::GP, Some(0));
    m.faults(&[0x0f, 0x20, 0xc0], vector::GP, Some(0)); // mov eax, cr0
    m.faults(&[0x0f, 0x06], vector::GP, Some(0)); // clts
    m.faults(&[0x0f, 0x01, 0xf0], vector::GP, Some(0)); // lmsw ax
}

#[test]
fn task_priority_is_the_platforms() {
    let mut m = Machine::long();
    m.state.gpr[0] = 16;
    m.faults(&[0x44, 0x0f, 0x22, 0xc0], vector::GP, Some(0));
    m.state.gpr[0] = 9;
    assert_eq!(m.run(&[0x44, 0x0f, 0x22, 0xc0]), Ok(Next::Sequential));
    assert_eq!(m.platform.task_priority, 9);
    assert_eq!(m.run(&[0x44, 0x0f, 0x20, 0xc3]), Ok(Next::Sequential));
    assert_eq!(m.state.gpr[3], 9);
}

#[test]
fn lmsw_sets_but_does_not_clear_protection() {
    let mut m = Machine::protected();
    m.state.gpr[0] = 0x8;
    assert_eq!(m.run(&[0x0f, 0x01, 0xf0]), Ok(Next::Sequential));
    assert_eq!(m.state.cr0, (Cr0::PE | Cr0::ET | Cr0::TS).bits());
    assert_eq!(m.run(&[0x0f, 0x06]), Ok(Next::Sequential)); // clts
    assert_eq!(m.state.cr0, (Cr0::PE | Cr0::ET).bits());
    assert!(m.effects.contains(Effects::FPU));
}

#[test]
fn user_mode_instruction_prevention() {
    let mut m = Machine::user();
    assert_eq!(m.run(&[0x0f, 0x01, 0xe0]), Ok(Next::Sequential)); // smsw eax
    m.state.cr4 = Cr4::UMIP.bits();
    assert_eq!(m.run(&[0x0f, 0x01, 0xe0]), general(0));
    assert_eq!(m.run(&[0x0f, 0x00, 0xc0]), general(0)); // sldt eax
    assert_eq!(m.run(&[0x0f, 0x01, 0x03]), general(0)); // sgdt [ebx]
}

#[test]
fn invalidations() {
    let mut m = Machine::long();
    m.state.gpr[3] = 0xffff_8000_0000_1234;
    assert_eq!(m.run(&[0x0f, 0x01, 0x3b]), Ok(Next::Sequential)); // invlpg [rbx]
    let page = addr::Gva::new(0xffff_8000_0000_1234);
    assert_eq!(m.memory.flushes, [Flush::Page(page)]);
    m.memory.flushes.clear();
    m.state.gpr[3] = 0x6000;
    m.put(0x6000, &5u64.to_le_bytes());
    m.state.gpr[0] = 1;
    m.faults(&[0x66, 0x0f, 0x38, 0x82, 0x03], vector::GP, Some(0)); // PCID without PCIDE
    m.state.cr4 |= Cr4::PCIDE.bits();
    assert_eq!(m.run(&[0x66, 0x0f, 0x38, 0x82, 0x03]), Ok(Next::Sequential));
    m.state.gpr[0] = 2;
    assert_eq!(m.run(&[0x66, 0x0f, 0x38, 0x82, 0x03]), Ok(Next::Sequential));
    m.state.gpr[0] = 4;
    m.faults(&[0x66, 0x0f, 0x38, 0x82, 0x03], vector::GP, Some(0));
    assert_eq!(m.memory.flushes, [Flush::Pcid(5), Flush::All]);
}

#[test]
fn xcr0_is_checked() {
    let mut m = Machine::long();
    m.state.gpr[0] = 7;
    m.faults(&[0x0f, 0x01, 0xd1], vector::UD, None);
    m.state.cr4 |= Cr4::OSXSAVE.bits();
    assert_eq!(m.run(&[0x0f, 0x01, 0xd1]), Ok(Next::Sequential));
    assert_eq!(m.state.xcr0, 7);
    m.state.gpr[0] = 5;
    m.faults(&[0x0f, 0x01, 0xd1], vector::GP, Some(0));
    assert_eq!(m.run(&[0x0f, 0x01, 0xd0]), Ok(Next::Sequential)); // xgetbv
    assert_eq!(m.state.gpr[0], 7);
}
