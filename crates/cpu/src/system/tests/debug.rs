//! Debug registers, breakpoints, single step.

use addr::Gva;
use x86::control::Cr4;
use x86::debug::{DR6_BD, DR6_BS};
use x86::rflags;
use x86::vector;

use super::Machine;
use crate::system::debug::{DataAccess, data_breakpoints, watched_ranges};
use crate::system::{
    Abort, Boundary, Event, Next, begin_instruction, boundary, end_instruction, execute, must_step,
};
use crate::{Exception, Exit};

fn step(m: &mut Machine, bytes: &[u8]) -> Result<Boundary, Abort> {
    let mut decoder =
        iced_x86::Decoder::with_ip(32, bytes, m.state.rip, iced_x86::DecoderOptions::NONE);
    let instruction = decoder.decode();
    m.with(|ctx| {
        let step = begin_instruction(ctx)?;
        execute(ctx, &instruction)?;
        end_instruction(ctx, step);
        boundary(ctx)
    })
}

const CLI: &[u8] = &[0xfa];

#[test]
fn registers_and_their_fixed_bits() {
    let mut m = Machine::long();
    m.state.gpr[0] = 0xffff_ffff;
    assert_eq!(m.run(&[0x0f, 0x23, 0xf0]), Ok(Next::Sequential)); // mov dr6, rax
    assert_eq!(m.state.dr6, 0xffff_eff0 | 0xf);
    m.state.gpr[0] = 0;
    assert_eq!(m.run(&[0x0f, 0x23, 0xf8]), Ok(Next::Sequential)); // mov dr7, rax
    assert_eq!(m.state.dr7, 0x400);
    m.state.gpr[0] = 1 << 32;
    m.faults(&[0x0f, 0x23, 0xf8], vector::GP, Some(0));
    assert_eq!(m.run(&[0x0f, 0x23, 0xd8]), Ok(Next::Sequential)); // mov dr3, rax
    assert_eq!(m.state.dr[3], 1 << 32);
    assert_eq!(m.run(&[0x0f, 0x21, 0xe3]), Ok(Next::Sequential)); // mov rbx, dr4
    assert_eq!(m.state.gpr[3], m.state.dr6);
    m.state.cr4 |= Cr4::DE.bits();
    m.faults(&[0x0f, 0x21, 0xe3], vector::UD, None);
    Machine::user().faults(&[0x0f, 0x21, 0xc3], vector::GP, Some(0));
}

#[test]
fn general_detect() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.state.dr7 = 0x2400;
    let fault = Exception::debug(DR6_BD);
    assert_eq!(m.run(&[0x0f, 0x21, 0xc3]), Err(fault.into()));
    assert_eq!(m.deliver(Event::Exception(fault)), Ok(()));
    assert_eq!((m.state.dr6, m.state.dr7), (0xffff_2ff0, 0x400));
}

#[test]
fn single_step_traps_after_the_instruction() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.state.rflags |= rflags::TF;
    assert!(must_step(&m.state, &m.pending, &m.guest_debug));
    assert_eq!(step(&mut m, CLI), Ok(Boundary::Delivered));
    assert_eq!((m.state.rip, m.state.dr6), (0x5000, 0xffff_4ff0));
    assert_eq!(m.stack::<3>(4)[0], 0x7001);
    assert_eq!(
        m.stack::<3>(4)[2],
        rflags::TF | 2,
        "a trap's frame has no RF"
    );
    assert!(!must_step(&m.state, &m.pending, &m.guest_debug));
}

#[test]
fn no_trap_of_an_interrupt_instruction() {
    let mut m = Machine::protected();
    m.gate32(0x80, 0xe, 0, 0x5000);
    m.state.rflags |= rflags::TF;
    assert_eq!(step(&mut m, &[0xcd, 0x80]), Ok(Boundary::Continue));
    assert_eq!((m.state.rip, m.pending.debug), (0x5000, 0));
}

#[test]
fn popf_that_sets_tf_traps_after_the_next_instruction() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.put(0x8000, &(rflags::TF as u32).to_le_bytes());
    assert_eq!(step(&mut m, &[0x9d]), Ok(Boundary::Continue));
    assert_eq!(step(&mut m, CLI), Ok(Boundary::Delivered));
    assert_eq!(m.stack::<1>(4), [0x7002]);
}

#[test]
fn instruction_breakpoint_and_resume_flag() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.state.dr[1] = 0x7000;
    m.state.dr7 = 0x400 | 1 << 2;
    assert!(must_step(&m.state, &m.pending, &m.guest_debug));
    let fault = Exception::debug(2);
    assert_eq!(step(&mut m, CLI), Err(fault.into()));
    m.deliver(Event::Exception(fault)).unwrap();
    assert_eq!(m.stack::<1>(4), [0x7000]);
    // The handler sets RF in the frame, and the instruction runs.
    let frame = m.state.gpr[4] + 8;
    m.put(frame, &((rflags::RF | 2) as u32).to_le_bytes());
    assert_eq!(step(&mut m, &[0xcf]), Ok(Boundary::Continue));
    assert!(m.state.flags_have(rflags::RF));
    assert_eq!(step(&mut m, CLI), Ok(Boundary::Continue));
    assert_eq!((m.state.rip, m.state.rflags), (0x7001, 2));
}

#[test]
fn shadows_last_one_instruction() {
    let mut m = Machine::protected();
    m.gate32(0x40, 0xe, 0, 0x5000);
    m.platform.interrupts.push_back(0x40);
    assert_eq!(step(&mut m, &[0xfb]), Ok(Boundary::Continue)); // sti
    assert!(must_step(&m.state, &m.pending, &m.guest_debug));
    assert_eq!(step(&mut m, &[0x9c]), Ok(Boundary::Delivered)); // pushf
    assert_eq!(m.stack::<1>(4), [0x7002]);
}

#[test]
fn mov_ss_holds_traps_back() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.state.gpr[0] = 0x10;
    m.state.rflags |= rflags::TF;
    assert_eq!(step(&mut m, &[0x8e, 0xd0]), Ok(Boundary::Continue));
    assert_eq!(step(&mut m, CLI), Ok(Boundary::Delivered));
    assert_eq!((m.stack::<1>(4), m.state.dr6), ([0x7003], 0xffff_4ff0));
}

#[test]
fn watchpoints() {
    let mut m = Machine::protected();
    m.state.dr[0] = 0x6004;
    m.state.dr7 = 0x400 | 1 | 0xd << 16; // write, 4 bytes
    m.state.dr[2] = 0x6008;
    m.state.dr7 |= 1 << 4 | 0x3 << 24; // read or write, 1 byte
    let bits =
        |at, len, access| data_breakpoints(&m.state, &m.guest_debug, Gva::new(at), len, access);
    assert_eq!(bits(0x6007, 1, DataAccess::Write), 1);
    assert_eq!(bits(0x6007, 1, DataAccess::Read), 0);
    assert_eq!(bits(0x6003, 1, DataAccess::Write), 0);
    assert_eq!(bits(0x6000, 16, DataAccess::Write), 5);
    assert_eq!(bits(0x6000, 16, DataAccess::Read), 4);
    let ranges: Vec<_> = watched_ranges(&m.state, &m.guest_debug).collect();
    assert_eq!(ranges, [(Gva::new(0x6004), 4), (Gva::new(0x6008), 1)]);
}

#[test]
fn port_breakpoints() {
    let mut m = Machine::protected();
    m.gate32(vector::DB, 0xe, 0, 0x5000);
    m.state.cr4 = Cr4::DE.bits();
    m.state.dr[0] = 0x80;
    m.state.dr7 = 0x400 | 1 | 0x2 << 16;
    assert_eq!(m.run(&[0xe6, 0x80]), Ok(Next::Sequential));
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!((m.state.dr6, m.stack::<1>(4)), (0xffff_0ff1, [0x7002]));
}

#[test]
fn the_monitor_watches() {
    let mut m = Machine::protected();
    m.guest_debug.enabled = true;
    m.guest_debug.single_step = true;
    m.guest_debug.software_breakpoints = true;
    let exit = |result| match result {
        Err(Abort::Exit(Exit::Debug(exit))) => (exit.vector, exit.pc, exit.dr6 & 0xe00f),
        other => panic!("{other:?}"),
    };
    assert_eq!(exit(step(&mut m, CLI)), (1, Gva::new(0x7001), DR6_BS));
    assert_eq!(exit(step(&mut m, &[0xcc])), (3, Gva::new(0x7001), 0));
    m.guest_debug.single_step = false;
    m.guest_debug.hardware_breakpoints = true;
    m.guest_debug.dr[3] = 0x7001;
    m.guest_debug.dr7 = 1 << 6;
    assert_eq!(exit(step(&mut m, CLI)), (1, Gva::new(0x7001), 8));
}

#[test]
fn a_shadow_that_nobody_waits_for_costs_nothing() {
    let mut m = Machine::protected();
    m.gate32(0x40, 0xe, 0, 0x5000);
    assert_eq!(m.run(&[0xfb]), Ok(Next::Sequential)); // sti
    assert!(!must_step(&m.state, &m.pending, &m.guest_debug));
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    // An interrupt comes before the next instruction: now the shadow must be exact.
    m.platform.interrupts.push_back(0x40);
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    assert!(must_step(&m.state, &m.pending, &m.guest_debug));
    assert_eq!(step(&mut m, &[0x9c]), Ok(Boundary::Delivered)); // pushf
    assert_eq!(m.stack::<1>(4), [0x7002]);
}

#[test]
fn a_shadow_is_over_where_rip_is_elsewhere() {
    let mut m = Machine::protected();
    m.gate32(0x40, 0xe, 0, 0x5000);
    m.run(&[0xfb]).unwrap();
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    m.state.rip = 0x7020;
    m.platform.interrupts.push_back(0x40);
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!(m.stack::<1>(4), [0x7020]);
}
