//! Exceptions of ordinary instructions: which, with what error code, and what is saved.

use super::{agree, everywhere, with_rax};
use crate::layout::{DATA, PML4, Start, sel};

#[test]
fn of_every_kind() {
    let mut guests = Vec::new();
    for (name, code, rax) in [
        ("ud2", &[0x0f, 0x0b][..], 0),
        ("div by zero", &[0x31, 0xc9, 0xf7, 0xf1], 5),
        ("idiv overflow", &[0xb1, 0xff, 0xf6, 0xf9], 0x8000),
        ("aam 0", &[0xd4, 0x00], 5),
        ("into", &[0xb0, 0x7f, 0x04, 0x01, 0xce], 0),
        ("hlt", &[0xf4], 0),
        ("undefined opcode", &[0x0f, 0xff, 0xc0], 0),
        ("lock nop", &[0xf0, 0x90], 0),
        ("invd", &[0x0f, 0x08], 0),
        ("rsm", &[0x0f, 0xaa], 0),
        ("too long", &[0x66; 15], 0),
        ("bound", &[0x62, 0x03], 5),
    ] {
        guests.extend(everywhere(name, code, rax));
    }
    agree(guests, &[]);
}

#[test]
fn of_segment_limits_and_types() {
    let mut guests = Vec::new();
    for start in [
        Start::Protected16,
        Start::Protected32,
        Start::User32,
        Start::UserCompatibility,
    ] {
        for selector in [
            0,
            sel::READ_ONLY | 3,
            sel::EXECUTE_ONLY | 3,
            sel::EXPAND_DOWN | 3,
            sel::USER_DATA16,
        ] {
            for (access, opcode) in [("read", 0x8b), ("write", 0x89)] {
                for offset in [0u16, 0xfffd, 0xffff] {
                    // mov ds, ax; mov ecx, [offset] or the reverse
                    let mut code = vec![0x8e, 0xd8, opcode, 0x0e];
                    if start.bits() == 32 {
                        code[3] = 0x0d;
                    }
                    code.extend(offset.to_le_bytes());
                    if start.bits() == 32 {
                        code.extend([0, 0]);
                    }
                    let name = format!("{access} {selector:#x}:{offset:#x}");
                    let mut guest = with_rax(&name, start, &code, selector.into());
                    if selector == sel::EXPAND_DOWN | 3 {
                        guest.put(0x1000 + 0xb0, &0x0000_f700_0000_0fff_u64.to_le_bytes());
                    }
                    guests.push(guest);
                }
            }
        }
    }
    agree(guests, &[]);
}

#[test]
fn of_paging() {
    let mut guests = Vec::new();
    for start in [
        Start::Paged32,
        Start::Long,
        Start::UserLong,
        Start::UserCompatibility,
    ] {
        for (access, code) in [("read", [0x8b, 0x03]), ("write", [0x89, 0x03])] {
            for entry in [0u64, 0x83, 0x85, 0x81, 0x2000_0087] {
                let name = format!("{access}, entry {entry:#x}");
                let mut guest = with_rax(&name, start, &code, 0x1234);
                guest.state.gpr[3] = 0x40_0010;
                guest.put(PML4 + 0x2000 + 16, &entry.to_le_bytes());
                guest.put(
                    crate::layout::DIRECTORY32 + 4,
                    &(entry as u32).to_le_bytes(),
                );
                guest.state.cr0 |= 1 << 16;
                guests.push(guest);
            }
        }
        let mut guest = with_rax("jump into nothing", start, &[0xff, 0xe3], 0);
        guest.state.gpr[3] = 0x40_0010;
        guests.push(guest);
    }
    agree(
        guests,
        &[(
            "UserLong: read, entry",
            "user code's TLB survives a change of its tables by the monitor",
        )],
    );
}

#[test]
fn of_addresses() {
    let mut guests = Vec::new();
    for start in [Start::Long, Start::UserLong] {
        for (name, code) in [
            ("mov rax, [rbx]", &[0x48, 0x8b, 0x03][..]),
            ("mov [rbx], rax", &[0x48, 0x89, 0x03]),
            ("mov rsp, rbx; push rax", &[0x48, 0x89, 0xdc, 0x50]),
            ("mov rsp, rbx; pop rax", &[0x48, 0x89, 0xdc, 0x58]),
            (
                "mov rbp, rbx; mov [rbp], al",
                &[0x48, 0x89, 0xdd, 0x88, 0x45, 0x00],
            ),
        ] {
            for rbx in [1 << 47, 0x7fff_ffff_fffc, 0xffff_7fff_ffff_ffff] {
                let mut guest = with_rax(&format!("{name} at {rbx:#x}"), start, code, 0);
                guest.state.gpr[3] = rbx;
                guests.push(guest);
            }
        }
    }
    agree(
        guests,
        &[(
            "at 0x7ffffffffffc",
            "an operand that ends past the canonical half faults there for the software KVM",
        )],
    );
}

#[test]
fn of_the_fpu() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("fninit", &[0xdb, 0xe3][..]),
        ("wait", &[0x9b]),
        ("xorps", &[0x0f, 0x57, 0xc0]),
        ("emms", &[0x0f, 0x77]),
        ("vzeroupper", &[0xc5, 0xf8, 0x77]),
    ] {
        for cr0 in [0, 2, 4, 8, 10, 6] {
            for cr4 in [0, 0x200, 0x4_0200] {
                let name = format!("{name}, cr0 {cr0:#x}, cr4 {cr4:#x}");
                for mut guest in everywhere(&name, code, 0) {
                    guest.state.cr0 |= cr0;
                    guest.state.cr4 |= cr4;
                    guests.push(guest);
                }
            }
        }
    }
    agree(
        guests,
        &[
            ("UserLong", "user code runs with the host's CR0 and CR4"),
            ("UserCompatibility", "the emulator does not know it"),
        ],
    );
}

#[test]
fn of_strings() {
    let mut guests = Vec::new();
    // rep movsb over the end of what is mapped
    for start in [Start::Paged32, Start::Long, Start::UserLong] {
        let mut guest = with_rax("rep movsb", start, &[0xf3, 0xa4], 0);
        guest.state.gpr[1] = 0x100;
        guest.state.gpr[6] = DATA;
        guest.state.gpr[7] = 0x40_0000;
        guests.push(guest);
    }
    agree(guests, &[]);
}
