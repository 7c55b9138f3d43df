//! Delivery of events, IRET, what comes when.

use x86::rflags;
use x86::vector;

use super::machine::{IST1, RSP0, sel};
use super::{Machine, general};
use crate::system::{Abort, Boundary, Event, Mode, Next};
use crate::{Exception, Exit};

const IRET: &[u8] = &[0xcf];
const IRETQ: &[u8] = &[0x48, 0xcf];

fn gp(code: u32) -> Event {
    Event::Exception(Exception::with_code(vector::GP, code))
}

#[test]
fn real_mode_table() {
    let mut m = Machine::real();
    m.put(0x21 * 4, &[0x34, 0x12, 0x00, 0x20]);
    m.state.rflags |= rflags::IF | rflags::TF | rflags::AC;
    assert_eq!(m.run(&[0xcd, 0x21]), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.segments.cs.base), (0x1234, 0x20000));
    assert_eq!(m.state.rflags, 2);
    assert_eq!(m.stack::<3>(2), [0x7002, 0, 0x302]);
    assert_eq!(m.run(IRET), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.state.gpr[4]), (0x7002, 0x8000));
    assert_eq!(m.state.rflags, rflags::IF | rflags::TF | 2);
}

#[test]
fn real_mode_pushes_no_error_code_and_shuts_down_without_a_table() {
    let mut m = Machine::real();
    assert_eq!(m.deliver(gp(0)), Ok(()));
    assert_eq!(m.state.gpr[4], 0x7ffa);
    m.state.idtr.limit = 0;
    assert_eq!(m.deliver(gp(0)), Err(Exit::Shutdown.into()));
}

#[test]
fn same_level_with_error_code() {
    let mut m = Machine::protected();
    m.gate32(vector::GP, 0xe, 0, 0x5000);
    m.state.rflags |= rflags::IF | rflags::NT;
    assert_eq!(m.deliver(gp(0x18)), Ok(()));
    let flags = rflags::IF | rflags::NT | rflags::RF | 2;
    assert_eq!(
        m.stack::<4>(4),
        [0x18, 0x7000, u64::from(sel::CODE32), flags]
    );
    assert_eq!((m.state.rip, m.state.rflags), (0x5000, 2));
}

#[test]
fn trap_gates_leave_interrupts_on() {
    let mut m = Machine::protected();
    m.gate32(0x80, 0xf, 0, 0x5000);
    m.state.rflags |= rflags::IF;
    assert_eq!(m.run(&[0xcd, 0x80]), Ok(Next::Jump));
    assert_eq!(m.state.rflags, rflags::IF | 2);
    assert_eq!(
        m.stack::<3>(4),
        [0x7002, u64::from(sel::CODE32), rflags::IF | 2]
    );
}

#[test]
fn inner_level_and_back() {
    let mut m = Machine::user();
    m.inner_stack32();
    m.gate32(0x80, 0xe, 3, 0x5000);
    m.gate32(0x81, 0xe, 0, 0x5000);
    m.state.rflags |= rflags::IF;
    assert_eq!(m.run(&[0xcd, 0x81]), general(0x81 * 8 + 2));
    assert_eq!(m.run(&[0xcd, 0x80]), Ok(Next::Jump));
    assert_eq!((m.state.cpl(), m.state.gpr[4]), (0, RSP0 - 20));
    assert_eq!(
        m.stack::<5>(4),
        [
            0x7002,
            u64::from(sel::USER_CODE32),
            rflags::IF | 2,
            0x8000,
            u64::from(sel::USER_DATA32),
        ]
    );
    assert_eq!(m.run(IRET), Ok(Next::Jump));
    assert_eq!(
        (m.state.rip, m.state.cpl(), m.state.gpr[4]),
        (0x7002, 3, 0x8000)
    );
    assert_eq!(m.state.rflags, rflags::IF | 2);
}

#[test]
fn user_iret_can_not_raise_its_privileges() {
    let mut m = Machine::user();
    let image = rflags::IF | rflags::IOPL | rflags::ZF | rflags::VM | rflags::ID;
    for (n, value) in [0x100, u64::from(sel::USER_CODE32), image]
        .into_iter()
        .enumerate()
    {
        m.put(0x8000 + 4 * n as u64, &(value as u32).to_le_bytes());
    }
    assert_eq!(m.run(IRET), Ok(Next::Jump));
    assert_eq!(m.state.rflags, rflags::ZF | rflags::ID | 2);
    m.put(0x800c, &0u32.to_le_bytes());
    m.put(0x8010, &u32::from(sel::CODE32).to_le_bytes());
    m.faults(IRET, vector::GP, Some(u32::from(sel::CODE32)));
}

#[test]
fn into_and_out_of_virtual_8086_mode() {
    let mut m = Machine::protected();
    let frame = [
        0x100,
        0x2000,
        rflags::VM | rflags::IF | 2,
        0x1ff0,
        0x3000,
        0x11,
        0x22,
        0x33,
        0x44,
    ];
    for (n, value) in frame.into_iter().enumerate() {
        m.put(0x8000 + 4 * n as u64, &(value as u32).to_le_bytes());
    }
    m.inner_stack32();
    m.gate32(vector::GP, 0xe, 0, 0x5000);
    assert_eq!(m.run(IRET), Ok(Next::Jump));
    assert_eq!((m.state.mode(), m.state.cpl()), (Mode::Virtual8086, 3));
    assert_eq!((m.state.segments.cs.base, m.state.rip), (0x20000, 0x100));
    assert_eq!(
        (m.state.segments.ss.base, m.state.gpr[4]),
        (0x30000, 0x1ff0)
    );
    assert_eq!(
        (m.state.segments.es.selector, m.state.segments.gs.base),
        (0x11, 0x440)
    );
    // CLI, POPF and INT n need IOPL 3.
    m.faults(&[0xfa], vector::GP, Some(0));
    m.faults(&[0x9c], vector::GP, Some(0));
    m.faults(&[0xcd, 0x21], vector::GP, Some(0));
    assert_eq!(m.deliver(gp(0)), Ok(()));
    assert_eq!((m.state.mode(), m.state.cpl()), (Mode::Protected, 0));
    assert_eq!(m.state.gpr[4], RSP0 - 40);
    assert_eq!(
        m.stack::<10>(4),
        [
            0,
            0x100,
            0x2000,
            rflags::VM | rflags::IF | rflags::RF | 2,
            0x1ff0,
            0x3000,
            0x11,
            0x22,
            0x33,
            0x44,
        ]
    );
    assert!(m.state.segments.ds.unusable);
}

#[test]
fn long_mode_frame_is_aligned() {
    let mut m = Machine::long();
    m.gate64(vector::GP, 0, 0, 0xffff_8000_0000_5000);
    m.state.gpr[4] = 0x8003;
    assert_eq!(m.deliver(gp(0x10)), Ok(()));
    assert_eq!(
        (m.state.rip, m.state.gpr[4]),
        (0xffff_8000_0000_5000, 0x7fd0)
    );
    assert_eq!(
        m.stack::<6>(8),
        [
            0x10,
            0x7000,
            u64::from(sel::CODE64),
            rflags::RF | 2,
            0x8003,
            u64::from(sel::DATA32),
        ]
    );
    assert_eq!(
        m.state.segments.ss.selector,
        sel::DATA32,
        "the level has not changed"
    );
}

#[test]
fn long_mode_inner_stack_and_interrupt_stack() {
    let mut m = Machine::long_user();
    m.inner_stack64();
    m.gate64(0x20, 0, 0, 0x5000);
    m.gate64(0x21, 1, 0, 0x5000);
    m.state.rflags |= rflags::IF;
    assert_eq!(m.deliver(Event::Interrupt(0x20)), Ok(()));
    assert_eq!((m.state.cpl(), m.state.gpr[4]), (0, RSP0 - 40));
    assert_eq!(
        (m.state.segments.ss.selector, m.state.segments.ss.unusable),
        (0, true)
    );
    assert_eq!(m.run(IRETQ), Ok(Next::Jump));
    assert_eq!(
        (m.state.cpl(), m.state.rip, m.state.gpr[4]),
        (3, 0x7000, 0x8000)
    );
    assert_eq!(m.state.segments.ss.selector, sel::USER_DATA32);
    assert_eq!(m.deliver(Event::Interrupt(0x21)), Ok(()));
    assert_eq!(m.state.gpr[4], IST1 - 40);
}

#[test]
fn iretq_checks() {
    let mut m = Machine::long();
    let frame = |m: &mut Machine, rip: u64, cs: u16, ss: u16| {
        m.state.gpr[4] = 0x8000;
        for (n, value) in [rip, cs.into(), 2, 0x9000, ss.into()]
            .into_iter()
            .enumerate()
        {
            m.put(0x8000 + 8 * n as u64, &value.to_le_bytes());
        }
    };
    frame(&mut m, 1 << 47, sel::CODE64, 0);
    m.faults(IRETQ, vector::GP, Some(0));
    frame(&mut m, 0x100, sel::USER_CODE64, 3);
    m.faults(IRETQ, vector::GP, Some(0));
    frame(&mut m, 0x100, sel::USER_CODE64, sel::DATA32);
    m.faults(IRETQ, vector::GP, Some(u32::from(sel::DATA32)));
    m.state.rflags |= rflags::NT;
    m.faults(IRETQ, vector::GP, Some(0));
    m.state.rflags = 2;
    frame(&mut m, 0x100, sel::CODE64, 0);
    assert_eq!(m.run(IRETQ), Ok(Next::Jump));
    assert!(m.state.segments.ss.unusable);
}

#[test]
fn double_and_triple_faults() {
    let mut m = Machine::protected();
    m.gate32(vector::DF, 0xe, 0, 0x5000);
    assert_eq!(m.deliver(gp(0)), Ok(())); // no gate for #GP
    assert_eq!(m.state.rip, 0x5000);
    assert_eq!(m.stack::<2>(4), [0, 0x7000]);
    let mut m = Machine::protected();
    assert_eq!(m.deliver(gp(0)), Err(Exit::Shutdown.into()));
}

#[test]
fn benign_events_make_no_double_fault() {
    let mut m = Machine::protected();
    m.gate32(vector::GP, 0xe, 0, 0x5000);
    assert_eq!(m.deliver(Event::Interrupt(0x40)), Ok(()));
    assert_eq!(m.stack::<1>(4), [0x40 * 8 + 3], "EXT is set");
    let mut m = Machine::protected();
    assert_eq!(m.run(&[0xcd, 0x40]), general(0x40 * 8 + 2));
}

#[test]
fn page_fault_during_delivery_sets_cr2() {
    let mut m = Machine::protected();
    m.gate32(0x40, 0xe, 0, 0x5000);
    m.gate32(vector::PF, 0xe, 0, 0x5000);
    m.gate32(vector::DF, 0xe, 0, 0x5000);
    m.memory.hole = Some(0x7000);
    assert_eq!(
        m.deliver(Event::Interrupt(0x40)),
        Err(Exit::Shutdown.into())
    );
    assert_eq!(m.state.cr2, 0x7ffc);
}

#[test]
fn an_interrupted_delivery_waits() {
    let mut m = Machine::protected();
    m.gate32(0x40, 0xe, 0, 0x5000);
    m.memory.host_hole = Some(0x7000);
    let before = m.state.gpr;
    assert!(matches!(
        m.deliver(Event::Interrupt(0x40)),
        Err(Abort::HostFault(_))
    ));
    assert_eq!((m.state.rip, m.state.gpr), (0x7000, before));
    assert_eq!(m.boundary(), Err(m.memory.host_fault()));
    m.memory.host_hole = None;
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!((m.state.rip, m.state.events.interrupt), (0x5000, None));
}

#[test]
fn order_at_a_boundary() {
    let mut m = Machine::protected();
    for vector in [1, 2, 0x40] {
        m.gate32(vector, 0xe, 0, 0x1_0000 * u64::from(vector));
    }
    m.state.rflags |= rflags::IF;
    m.platform.interrupts.push_back(0x40);
    m.state.events.nmi_pending = 1;
    m.pending.debug = 1 << 14;
    m.state.events.mov_ss_shadow = true;
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    m.state.events.mov_ss_shadow = false;
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!((m.state.rip, m.state.dr6), (0x1_0000, 0xffff_4ff0));
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!((m.state.rip, m.state.events.nmi_masked), (0x2_0000, true));
    m.state.events.nmi_pending = 1;
    assert_eq!(
        m.boundary(),
        Ok(Boundary::Continue),
        "interrupts are off, the NMI is masked"
    );
    assert_eq!(m.run(IRET), Ok(Next::Jump));
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!(m.state.rip, 0x2_0000);
    m.state.rflags |= rflags::IF;
    assert_eq!(m.boundary(), Ok(Boundary::Delivered));
    assert_eq!(m.state.rip, 0x40_0000);
}

#[test]
fn interrupt_window() {
    let mut m = Machine::protected();
    m.platform.window = true;
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    m.state.rflags |= rflags::IF;
    m.state.events.sti_shadow = true;
    assert_eq!(m.boundary(), Ok(Boundary::Continue));
    m.state.events.sti_shadow = false;
    assert_eq!(m.boundary(), Err(Abort::Exit(Exit::InterruptWindow)));
}

#[test]
fn traps_of_software() {
    let mut m = Machine::protected();
    m.gate32(vector::BP, 0xf, 0, 0x5000);
    m.gate32(vector::OF, 0xf, 0, 0x6000);
    assert_eq!(m.run(&[0xcc]), Ok(Next::Jump));
    assert_eq!((m.state.rip, m.stack::<1>(4)), (0x5000, [0x7001]));
    assert_eq!(m.run(&[0xce]), Ok(Next::Sequential));
    m.state.rflags |= rflags::OF;
    assert_eq!(m.run(&[0xce]), Ok(Next::Jump));
    assert_eq!(m.state.rip, 0x6000);
    m.state.gpr[3] = 0x6000;
    m.put(0x6000, &(-4i32).to_le_bytes());
    m.put(0x6004, &4i32.to_le_bytes());
    m.state.gpr[0] = 0xffff_fffc;
    assert_eq!(m.run(&[0x62, 0x03]), Ok(Next::Sequential)); // bound eax, [ebx]
    m.state.gpr[0] = 5;
    m.faults(&[0x62, 0x03], vector::BR, None);
}
