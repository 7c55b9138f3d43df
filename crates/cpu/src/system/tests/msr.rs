//! Model-specific registers and their shorthands.

use x86::control::{Cr4, Efer};
use x86::vector;

use super::Machine;
use crate::Exit;
use crate::system::{Abort, Effects, Next, complete_hypercall, complete_msr};

const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];

fn write(m: &mut Machine, index: u32, value: u64) -> Result<Next, Abort> {
    m.state.gpr[1] = u64::from(index);
    m.state.gpr[0] = value & 0xffff_ffff;
    m.state.gpr[2] = value >> 32;
    m.run(WRMSR)
}

fn read(m: &mut Machine, index: u32) -> u64 {
    m.state.gpr[1] = u64::from(index);
    m.run(RDMSR).unwrap();
    m.state.gpr[2] << 32 | m.state.gpr[0]
}

#[test]
fn own_registers_read_back() {
    let mut m = Machine::long();
    for (index, value) in [
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_1000),
        (0xc000_0084, 0x4_7700),
        (0xc000_0100, 0x7fff_0000_0000),
        (0xc000_0101, 0xffff_ffff_8000_0000),
        (0xc000_0102, 0x1000),
        (0xc000_0103, 7),
        (0x174, 0x10),
        (0x277, 0x0007_0406_0007_0406),
    ] {
        assert_eq!(
            write(&mut m, index, value),
            Ok(Next::Sequential),
            "{index:#x}"
        );
        assert_eq!(read(&mut m, index), value, "{index:#x}");
    }
    assert_eq!(m.state.segments.fs.base, 0x7fff_0000_0000);
}

#[test]
fn illegal_values() {
    let mut m = Machine::long();
    let refused = super::general(0);
    for index in [0xc000_0082, 0xc000_0100, 0xc000_0102] {
        assert_eq!(write(&mut m, index, 1 << 47), refused, "{index:#x}");
    }
    assert_eq!(write(&mut m, 0x175, 1 << 47), Ok(Next::Sequential));
    assert_eq!(m.state.msrs.sysenter_esp, 0xffff_8000_0000_0000);
    m.state.rip = 0x7000;
    assert_eq!(write(&mut m, 0x277, 2), refused);
    assert_eq!(write(&mut m, 0xc000_0103, 1 << 32), refused);
    assert_eq!(
        write(&mut m, 0xc000_0080, Efer::LME.bits() | 1 << 14),
        refused
    );
    assert_eq!(write(&mut m, 0xc000_0080, 0), refused, "LME while paging");
    assert_eq!(m.state.rip, 0x7000);
}

#[test]
fn lma_is_not_written() {
    let mut m = Machine::long();
    let value = (Efer::LME | Efer::SCE | Efer::NXE).bits();
    assert_eq!(write(&mut m, 0xc000_0080, value), Ok(Next::Sequential));
    assert_eq!(m.state.msrs.efer, value | Efer::LMA.bits());
    assert_eq!(m.memory.paging_changes, 1);
}

#[test]
fn time_stamp_counter() {
    let mut m = Machine::long();
    write(&mut m, 0x10, 1000).unwrap();
    assert_eq!(m.platform.written.len(), 1, "the platform keeps the TSC");
    let first = read(&mut m, 0x10);
    m.state.tsc_offset = 1 << 60;
    assert!(read(&mut m, 0x10) - first >= 1 << 60);
    m.state.tsc_offset = first.wrapping_neg();
    m.run(&[0x0f, 0x31]).unwrap();
    assert!((1..1_000_000_000).contains(&m.state.gpr[0]));
    let mut m = Machine::user();
    m.state.cr4 = Cr4::TSD.bits();
    m.faults(&[0x0f, 0x31], vector::GP, Some(0));
}

#[test]
fn the_platforms_registers() {
    let mut m = Machine::long();
    assert_eq!(read(&mut m, 0x1234), 0x1_0000_0002);
    write(&mut m, 0x1234, 5).unwrap();
    assert_eq!(m.platform.written.len(), 1);
    m.state.gpr[1] = 0x5678;
    m.faults(RDMSR, vector::GP, Some(0));
    let rip = m.state.rip;
    m.state.gpr[1] = 0x4000_0000;
    assert!(matches!(m.run(RDMSR), Err(Abort::Exit(Exit::Msr(_)))));
    assert_eq!(m.state.rip, rip);
    complete_msr(&mut m.state, &mut m.pending, Some(0x1_0000_0009));
    assert_eq!(
        (m.state.gpr[0], m.state.gpr[2], m.state.rip),
        (9, 1, rip + 2)
    );
}

#[test]
fn hypercalls() {
    let mut m = Machine::long();
    m.state.gpr[0] = 1;
    assert_eq!(m.run(&[0x0f, 0x01, 0xc1]), Ok(Next::Sequential));
    assert_eq!(m.state.gpr[0], 0x99);
    assert!(matches!(
        m.run(&[0x0f, 0x01, 0xd9]),
        Err(Abort::Exit(Exit::Hypercall(_)))
    ));
    complete_hypercall(&mut m.state, &mut m.pending, 5);
    assert_eq!((m.state.gpr[0], m.state.rip), (5, 0x7006));
}

#[test]
fn segment_bases() {
    let mut m = Machine::long();
    m.state.gpr[0] = 0x1234;
    let wrfsbase: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xd0];
    m.faults(wrfsbase, vector::UD, None);
    m.state.cr4 |= Cr4::FSGSBASE.bits();
    assert_eq!(m.run(wrfsbase), Ok(Next::Sequential));
    assert_eq!(m.state.segments.fs.base, 0x1234);
    m.state.gpr[0] = 1 << 47;
    m.faults(wrfsbase, vector::GP, Some(0));
    assert_eq!(m.run(&[0xf3, 0x48, 0x0f, 0xae, 0xc0]), Ok(Next::Sequential)); // rdfsbase rax
    assert_eq!(m.state.gpr[0], 0x1234);
}

#[test]
fn swapgs_swaps() {
    let mut m = Machine::long();
    m.state.msrs.kernel_gs_base = 5;
    assert_eq!(m.run(&[0x0f, 0x01, 0xf8]), Ok(Next::Sequential));
    assert_eq!(
        (m.state.segments.gs.base, m.state.msrs.kernel_gs_base),
        (5, 0)
    );
    assert!(m.effects.contains(Effects::SEGMENTS));
    Machine::long_user().faults(&[0x0f, 0x01, 0xf8], vector::GP, Some(0));
}

#[test]
fn cpuid_and_halt() {
    let mut m = Machine::long();
    m.state.gpr[0] = 7;
    m.state.gpr[1] = 1;
    assert_eq!(m.run(&[0x0f, 0xa2]), Ok(Next::Sequential));
    assert_eq!(m.state.gpr[..4], [8, 3, 4, 1]);
    assert_eq!(m.run(&[0xf4]), Err(Exit::Halt.into()));
    assert_eq!(m.state.rip, 0x7003);
    m.platform.interrupts.push_back(0x40);
    assert_eq!(m.run(&[0xf4]), Ok(Next::Sequential));
    Machine::user().faults(&[0xf4], vector::GP, Some(0));
}
