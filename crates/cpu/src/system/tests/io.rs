//! Ports.

use x86::rflags;
use x86::vector;

use super::machine::TSS;
use super::{Machine, page_fault};
use crate::system::{Completion, Next, complete_io};
use crate::{Exit, IoDirection, IoExit};

fn io_exit(port: u16, size: u8, direction: IoDirection, count: u32) -> crate::system::Abort {
    Exit::Io(IoExit {
        port,
        size,
        direction,
        count,
    })
    .into()
}

#[test]
fn the_platform_answers() {
    let mut m = Machine::real();
    m.platform.port_bytes.extend([0x11, 0x22]);
    m.state.gpr[0] = 0xffff_ffff;
    assert_eq!(m.run(&[0xe5, 0x80]), Ok(Next::Sequential)); // in ax, 0x80
    assert_eq!((m.state.gpr[0], m.state.rip), (0xffff_2211, 0x7002));
    assert_eq!(m.run(&[0xe6, 0x80]), Ok(Next::Sequential)); // out 0x80, al
    assert_eq!(m.platform.written, [(0x80, vec![0x11])]);
}

#[test]
fn the_monitor_answers() {
    let mut m = Machine::long();
    m.state.gpr[2] = 0x3f8;
    m.state.gpr[0] = u64::MAX;
    assert_eq!(m.run(&[0xed]), Err(io_exit(0x3f8, 4, IoDirection::In, 1)));
    assert_eq!((m.state.rip, m.state.gpr[0]), (0x7000, u64::MAX));
    let done = complete_io(&mut m.state, &mut m.pending, &[1, 2, 3, 4]);
    assert_eq!(done, Completion::Done);
    assert_eq!((m.state.rip, m.state.gpr[0]), (0x7001, 0x0403_0201));
    assert_eq!(m.run(&[0xee]), Err(io_exit(0x3f8, 1, IoDirection::Out, 1)));
    assert_eq!(m.pending.exit.output(), [1]);
    complete_io(&mut m.state, &mut m.pending, &[]);
    assert_eq!(m.state.rip, 0x7002);
}

#[test]
fn permission_bitmap() {
    let mut m = Machine::user();
    m.state.gpr[2] = 0x80;
    m.put(TSS + 102, &0x68u16.to_le_bytes());
    m.faults(&[0xec], vector::GP, Some(0)); // the bitmap lies past the limit
    m.state.segments.tr.limit = 0x68 + 0x11;
    m.put(TSS + 0x68 + 0x10, &[0b10, 0]);
    assert_eq!(m.run(&[0xec]), Ok(Next::Sequential)); // in al, dx
    m.faults(&[0xed], vector::GP, Some(0)); // port 0x81 is not allowed
    m.state.rflags |= rflags::IOPL;
    assert_eq!(m.run(&[0xed]), Ok(Next::Sequential));
    let mut m = Machine::virtual8086();
    m.state.rflags |= rflags::IOPL;
    m.put(TSS + 102, &0x68u16.to_le_bytes());
    m.faults(&[0xec], vector::GP, Some(0)); // IOPL doesn't count in virtual-8086 mode
}

#[test]
fn strings_of_the_platform() {
    let mut m = Machine::real();
    m.platform.port_bytes.extend(1..=6);
    m.state.gpr[1] = 3;
    m.state.gpr[2] = 0x80;
    m.state.gpr[7] = 0x6000;
    assert_eq!(m.run(&[0xf3, 0x6d]), Ok(Next::Sequential)); // rep insw
    assert_eq!(m.get(0x6000, 6), 0x0605_0403_0201);
    assert_eq!(
        (m.state.gpr[1], m.state.gpr[7], m.state.rip),
        (0, 0x6006, 0x7002)
    );
    m.state.rflags |= rflags::DF;
    m.state.gpr[1] = 2;
    m.state.gpr[6] = 0x6004;
    assert_eq!(m.run(&[0xf3, 0x6f]), Ok(Next::Again)); // rep outsw, downwards
    assert_eq!(m.run(&[0xf3, 0x6f]), Ok(Next::Sequential));
    assert_eq!(m.platform.written, [(0x80, vec![5, 6]), (0x80, vec![3, 4])]);
    assert_eq!(m.state.gpr[6], 0x6000);
    assert_eq!(
        m.run(&[0xf3, 0x6f]),
        Ok(Next::Sequential),
        "nothing left to do"
    );
}

#[test]
fn strings_of_the_monitor() {
    let mut m = Machine::long();
    m.state.gpr[1] = 0x1001;
    m.state.gpr[2] = 0x1f0;
    m.state.gpr[7] = 0x6ffc;
    let insw: &[u8] = &[0xf3, 0x66, 0x6d];
    assert_eq!(m.run(insw), Err(io_exit(0x1f0, 2, IoDirection::In, 2)));
    let done = complete_io(&mut m.state, &mut m.pending, &[1, 2, 3, 4]);
    assert_eq!(done, Completion::RunAgain);
    assert_eq!(m.run(insw), Ok(Next::Again));
    assert_eq!(m.get(0x6ffc, 4), 0x0403_0201);
    assert_eq!(
        (m.state.gpr[1], m.state.gpr[7], m.state.rip),
        (0xfff, 0x7000, 0x7000)
    );
    assert_eq!(m.run(insw), Err(io_exit(0x1f0, 2, IoDirection::In, 512)));
    m.state.gpr[6] = 0x6ffc;
    m.state.gpr[1] = 2;
    assert_eq!(
        m.run(&[0xf3, 0x66, 0x6f]),
        Err(io_exit(0x1f0, 2, IoDirection::Out, 2))
    );
    assert_eq!(m.pending.exit.output(), [1, 2, 3, 4]);
    complete_io(&mut m.state, &mut m.pending, &[]);
    assert_eq!(
        (m.state.gpr[1], m.state.gpr[6], m.state.rip),
        (0, 0x7000, 0x7003)
    );
}

#[test]
fn no_port_is_read_for_memory_that_faults() {
    let mut m = Machine::real();
    m.platform.port_bytes.push_back(1);
    m.memory.hole = Some(0x6000);
    m.state.gpr[2] = 0x80;
    m.state.gpr[7] = 0x6000;
    assert_eq!(m.run(&[0x6c]), Err(page_fault(0x6000)));
    assert_eq!(m.platform.port_bytes.len(), 1);
}
