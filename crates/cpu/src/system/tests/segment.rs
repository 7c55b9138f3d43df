//! Segment registers, descriptor tables, questions about descriptors.

use x86::rflags;
use x86::vector;

use super::machine::{GDT, TSS, sel};
use super::{Machine, general, page_fault};
use crate::system::{Effects, Next};

const MOV_DS_AX: &[u8] = &[0x8e, 0xd8];
const MOV_SS_AX: &[u8] = &[0x8e, 0xd0];

fn load(m: &mut Machine, bytes: &[u8], selector: u16) -> Result<Next, crate::system::Abort> {
    m.state.gpr[0] = u64::from(selector);
    m.run(bytes)
}

#[test]
fn real_mode_keeps_limits() {
    let mut m = Machine::real();
    m.state.segments.ds.limit = 0xffff_ffff;
    assert_eq!(load(&mut m, MOV_DS_AX, 0x1234), Ok(Next::Sequential));
    let ds = m.state.segments.ds;
    assert_eq!(
        (ds.base, ds.limit, ds.selector),
        (0x12340, 0xffff_ffff, 0x1234)
    );
}

#[test]
fn data_segments_are_checked() {
    let mut m = Machine::protected();
    assert_eq!(load(&mut m, MOV_DS_AX, sel::ABSENT_DATA), {
        Err(crate::Exception::with_code(vector::NP, u32::from(sel::ABSENT_DATA)).into())
    });
    for wrong in [sel::TSS, sel::EXECUTE_ONLY, 0x100, 0x0c] {
        assert_eq!(load(&mut m, MOV_DS_AX, wrong), general(u32::from(wrong)));
    }
    assert_eq!(load(&mut m, MOV_DS_AX, 3), Ok(Next::Sequential));
    assert!(m.state.segments.ds.unusable);
    let mut m = Machine::user();
    assert_eq!(
        load(&mut m, MOV_DS_AX, sel::DATA32 | 3),
        general(u32::from(sel::DATA32))
    );
    assert_eq!(
        load(&mut m, MOV_DS_AX, sel::CONFORMING),
        Ok(Next::Sequential)
    );
}

#[test]
fn loading_sets_the_accessed_bit() {
    let mut m = Machine::protected();
    m.put_descriptor(sel::DATA32, 0x00cf_9200_0000_ffff);
    assert_eq!(load(&mut m, MOV_DS_AX, sel::DATA32), Ok(Next::Sequential));
    assert_eq!(m.descriptor(sel::DATA32), 0x00cf_9300_0000_ffff);
    assert_eq!(m.state.segments.ds.attributes, 0xc093);
}

#[test]
fn stack_segments_are_checked() {
    let mut m = Machine::protected();
    assert_eq!(load(&mut m, MOV_SS_AX, 0), general(0));
    for wrong in [
        sel::READ_ONLY,
        sel::USER_DATA32,
        sel::DATA32 | 1,
        sel::CODE32,
    ] {
        assert_eq!(
            load(&mut m, MOV_SS_AX, wrong),
            general(u32::from(wrong & !3))
        );
    }
    m.put_descriptor(sel::ABSENT_DATA, 0x00cf_1300_0000_ffff);
    assert_eq!(load(&mut m, MOV_SS_AX, sel::ABSENT_DATA), {
        Err(crate::Exception::with_code(vector::SS, u32::from(sel::ABSENT_DATA)).into())
    });
    assert_eq!(load(&mut m, MOV_SS_AX, sel::DATA16), Ok(Next::Sequential));
    assert_eq!(m.state.sp_mask(), 0xffff);
    assert!(m.state.events.mov_ss_shadow);
    assert!(m.effects.contains(Effects::SHADOW));
}

#[test]
fn null_stack_in_64bit_mode() {
    let mut m = Machine::long();
    assert_eq!(load(&mut m, MOV_SS_AX, 0), Ok(Next::Sequential));
    assert_eq!((m.state.cpl(), m.state.segments.ss.unusable), (0, true));
    assert_eq!(load(&mut m, MOV_SS_AX, 1), general(0));
    let mut m = Machine::long_user();
    assert_eq!(load(&mut m, MOV_SS_AX, 3), general(0));
}

#[test]
fn pop_into_a_segment_register() {
    let mut m = Machine::protected();
    m.put(0x8000, &u32::from(sel::DATA16).to_le_bytes());
    assert_eq!(m.run(&[0x1f]), Ok(Next::Sequential)); // pop ds
    assert_eq!(
        (m.state.segments.ds.selector, m.state.gpr[4]),
        (sel::DATA16, 0x8004)
    );
    m.put(0x8004, &u32::from(sel::TSS).to_le_bytes());
    m.faults(&[0x1f], vector::GP, Some(u32::from(sel::TSS)));
    assert_eq!(m.run(&[0x1e]), Ok(Next::Sequential)); // push ds
    assert_eq!(m.stack::<1>(4), [u64::from(sel::DATA16)]);
}

#[test]
fn far_pointers() {
    let mut m = Machine::protected();
    m.state.gpr[3] = 0x6000;
    m.put(0x6000, &[0x78, 0x56, 0x34, 0x12, sel::DATA16 as u8, 0]);
    assert_eq!(m.run(&[0xc5, 0x03]), Ok(Next::Sequential)); // lds eax, [ebx]
    assert_eq!(
        (m.state.gpr[0], m.state.segments.ds.selector),
        (0x1234_5678, sel::DATA16)
    );
}

#[test]
fn table_registers() {
    let mut m = Machine::protected();
    m.state.gpr[3] = 0x6000;
    m.put(0x6000, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x92]);
    assert_eq!(m.run(&[0x0f, 0x01, 0x13]), Ok(Next::Sequential)); // lgdt [ebx]
    assert_eq!(
        (m.state.gdtr.base, m.state.gdtr.limit),
        (0x9234_5678, 0x1234)
    );
    assert_eq!(m.run(&[0x66, 0x0f, 0x01, 0x13]), Ok(Next::Sequential));
    assert_eq!(m.state.gdtr.base, 0x34_5678);
    m.state.gpr[3] = 0x6100;
    assert_eq!(m.run(&[0x0f, 0x01, 0x03]), Ok(Next::Sequential)); // sgdt [ebx]
    assert_eq!(m.get(0x6100, 6), 0x0034_5678_1234);
    let mut m = Machine::long();
    m.state.gpr[3] = 0x6000;
    m.put(0x6002, &(1u64 << 47).to_le_bytes());
    m.faults(&[0x0f, 0x01, 0x1b], vector::GP, Some(0)); // lidt, not canonical
}

#[test]
fn task_register_becomes_busy() {
    let mut m = Machine::protected();
    m.state.gpr[0] = u64::from(sel::TSS);
    assert_eq!(m.run(&[0x0f, 0x00, 0xd8]), Ok(Next::Sequential)); // ltr ax
    assert_eq!(m.state.segments.tr.attributes, 0x8b);
    assert_eq!(m.state.segments.tr.base, TSS);
    assert_eq!(m.descriptor(sel::TSS), 0x0000_8b00_3000_0067);
    m.faults(&[0x0f, 0x00, 0xd8], vector::GP, Some(u32::from(sel::TSS)));
    m.state.gpr[0] = 0;
    m.faults(&[0x0f, 0x00, 0xd8], vector::GP, Some(0));
    Machine::real().faults(&[0x0f, 0x00, 0xd8], vector::UD, None);
}

#[test]
fn local_table() {
    let mut m = Machine::protected();
    m.put(0x4008, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
    assert_eq!(load(&mut m, MOV_DS_AX, 0x0c), general(0x0c));
    assert_eq!(
        load(&mut m, &[0x0f, 0x00, 0xd0], sel::LDT),
        Ok(Next::Sequential)
    );
    assert_eq!(load(&mut m, MOV_DS_AX, 0x0c), Ok(Next::Sequential));
    assert_eq!(
        load(&mut m, &[0x0f, 0x00, 0xd0], sel::TSS),
        general(u32::from(sel::TSS))
    );
    assert_eq!(load(&mut m, &[0x0f, 0x00, 0xd0], 0), Ok(Next::Sequential));
    assert_eq!(load(&mut m, MOV_DS_AX, 0x0c), general(0x0c));
}

#[test]
fn questions_about_descriptors() {
    let mut m = Machine::user();
    let zero = |m: &Machine| m.state.rflags & rflags::ZF != 0;
    m.state.gpr[0] = u64::from(sel::DATA32);
    m.run(&[0x0f, 0x02, 0xd0]).unwrap(); // lar edx, eax
    assert!(!zero(&m), "DPL 0 is not to be seen from CPL 3");
    m.state.gpr[0] = u64::from(sel::USER_DATA32);
    m.run(&[0x0f, 0x02, 0xd0]).unwrap();
    assert!(zero(&m));
    assert_eq!(m.state.gpr[2] & 0x00f0_ff00, 0x00c0_f300);
    m.run(&[0x0f, 0x03, 0xd0]).unwrap(); // lsl edx, eax
    assert_eq!(m.state.gpr[2], 0xffff_ffff);
    m.run(&[0x0f, 0x00, 0xe8]).unwrap(); // verw ax
    assert!(zero(&m));
    m.state.gpr[0] = u64::from(sel::USER_CODE32);
    m.run(&[0x0f, 0x00, 0xe8]).unwrap();
    assert!(!zero(&m), "code can't be written");
    m.run(&[0x0f, 0x00, 0xe0]).unwrap(); // verr ax
    assert!(zero(&m));
    m.state.gpr[0] = 0;
    m.run(&[0x0f, 0x00, 0xe0]).unwrap();
    assert!(!zero(&m));
}

#[test]
fn adjusting_a_requested_level() {
    let mut m = Machine::protected();
    m.state.gpr[0] = 0x10;
    m.state.gpr[1] = 3;
    assert_eq!(m.run(&[0x63, 0xc8]), Ok(Next::Sequential)); // arpl ax, cx
    assert_eq!(m.state.gpr[0], 0x13);
    assert!(m.state.flags_have(rflags::ZF));
    assert_eq!(m.run(&[0x63, 0xc8]), Ok(Next::Sequential));
    assert!(!m.state.flags_have(rflags::ZF));
}

#[test]
fn a_page_fault_on_the_table_comes_through() {
    let mut m = Machine::protected();
    m.memory.hole = Some(GDT);
    m.state.gpr[0] = u64::from(sel::DATA32);
    let at = GDT + u64::from(sel::DATA32);
    assert_eq!(m.run(MOV_DS_AX), Err(page_fault(at)));
}
