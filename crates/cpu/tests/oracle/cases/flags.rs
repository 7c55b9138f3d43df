//! RFLAGS: who may change what.

use super::{agree, everywhere};
use crate::layout::{HANDLERS, HLT};

#[test]
fn instructions() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("cli", &[0xfa][..]),
        ("sti; nop", &[0xfb, 0x90]),
        ("pushf", &[0x9c]),
        ("popf", &[0x9d]),
        ("pushf of the other width", &[0x66, 0x9c]),
        ("popf of the other width", &[0x66, 0x9d]),
        ("stac", &[0x0f, 0x01, 0xcb]),
        ("sahf; lahf", &[0x9e, 0x9f]),
    ] {
        for flags in [0, 0x200, 0x1000, 0x3000, 0x3200] {
            for cr4 in [0, 1, 2] {
                for image in [0u64, 0x3ed7, 0x003c_4202] {
                    let name = format!("{name} {image:#x}, flags {flags:#x}, cr4 {cr4:#x}");
                    for mut guest in everywhere(&name, code, image) {
                        guest.state.rflags |= flags;
                        guest.state.cr4 |= cr4;
                        guest.state.gpr[4] -= 0x100;
                        let top = guest.state.gpr[4];
                        guest.put(top, &image.to_le_bytes());
                        guests.push(guest);
                    }
                }
            }
        }
    }
    agree(
        guests,
        &[
            ("cr4 0x2", "no protected-mode virtual interrupts"),
            ("UserLong: pushf", "user code sees the host's IF"),
        ],
    );
}

#[test]
fn single_step() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("nop", &[0x90][..]),
        ("mov ss, ax; nop", &[0x8e, 0xd0, 0x90]),
        ("int 0x80", &[0xcd, 0x80]),
        ("pushf; popf; nop", &[0x9c, 0x9d, 0x90]),
        ("jmp", &[0xeb, 0x01, HLT, 0x90]),
        ("rep stosb", &[0xf3, 0xaa]),
        ("ud2", &[0x0f, 0x0b]),
    ] {
        for mut guest in everywhere(&format!("step {name}"), code, 0) {
            guest.state.rflags |= 0x100;
            guest.state.gpr[0] = u64::from(guest.state.segments.ss.selector);
            guest.state.gpr[1] = 3;
            guests.push(guest);
        }
    }
    agree(
        guests,
        &[
            ("step mov ss", "the emulator has no MOV SS shadow"),
            ("Real: step int", "the emulator traps after the interrupt"),
            ("UserLong: step pushf", "user code sees the host's IF"),
            ("step rep stosb", "the emulator steps over all iterations"),
        ],
    );
}

#[test]
fn breakpoints() {
    let mut guests = Vec::new();
    for (name, dr7, address) in [
        ("execute", 0x401, 0x7001),
        ("execute, resumed", 0x401, 0x7000),
        ("write 4", 0xd_0401, 0x6000),
        ("read or write 2", 0x7_0401, 0x6002),
        ("write elsewhere", 0xd_0401, 0x6010),
    ] {
        // nop; mov [ebx], eax; nop — in 16-bit code [bp+di], which is made the same
        for mut guest in everywhere(name, &[0x90, 0x89, 0x03, 0x90], 0x1234) {
            guest.state.dr[0] = address;
            guest.state.dr7 = dr7;
            if address == 0x7000 {
                guest.state.rflags |= 1 << 16;
            }
            if guest.state.segments.cs.limit == 0xffff {
                guest.state.gpr[7] = 0;
                guest.state.gpr[5] = 0x6000;
            }
            guest.put(HANDLERS + 16, &[HLT]);
            guests.push(guest);
        }
    }
    agree(
        guests,
        &[
            ("UserLong", "user code has no breakpoints"),
            ("write 4", "no data breakpoints"),
            ("read or write 2", "no data breakpoints"),
        ],
    );
}
