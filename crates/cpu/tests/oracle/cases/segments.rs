//! Segment registers, LDTR, TR, and the questions about descriptors.

use super::{SELECTORS, agree, everywhere, with_rax};
use crate::layout::{LDT, Start, sel};

fn with_each_selector(name: &str, code: &[u8]) {
    let guests = SELECTORS
        .iter()
        .flat_map(|&selector| {
            let mut guests = everywhere(&format!("{name} {selector:#x}"), code, selector.into());
            for guest in &mut guests {
                if guest.state.cr0 & 1 != 0 && guest.state.rflags & 1 << 17 == 0 {
                    guest.state.segments.ldtr.base = LDT;
                    guest.state.segments.ldtr.limit = 0xff;
                    guest.state.segments.ldtr.selector = sel::LDT;
                }
            }
            guests
        })
        .collect();
    agree(
        guests,
        &[
            (
                "UserLong",
                "user code runs natively, with the host's segments",
            ),
            ("ltr 0xf", "the error code does not name the LDT"),
            ("Long: mov ss 0x0", "SS stays usable"),
        ],
    );
}

#[test]
fn mov_ds() {
    with_each_selector("mov ds", &[0x8e, 0xd8]);
}

#[test]
fn mov_ss() {
    with_each_selector("mov ss", &[0x8e, 0xd0]);
}

#[test]
fn mov_fs() {
    with_each_selector("mov fs", &[0x8e, 0xe0]);
}

#[test]
fn push_and_pop() {
    with_each_selector("push eax; pop gs", &[0x50, 0x0f, 0xa9]);
}

#[test]
fn lldt() {
    with_each_selector("lldt", &[0x0f, 0x00, 0xd0]);
}

#[test]
fn ltr() {
    with_each_selector("ltr", &[0x0f, 0x00, 0xd8]);
}

#[test]
fn lar() {
    with_each_selector("lar", &[0x0f, 0x02, 0xc8]);
}

#[test]
fn lsl() {
    with_each_selector("lsl", &[0x0f, 0x03, 0xc8]);
}

#[test]
fn verr_and_verw() {
    with_each_selector("verr", &[0x0f, 0x00, 0xe0]);
    with_each_selector("verw", &[0x0f, 0x00, 0xe8]);
}

#[test]
fn stored() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("str", &[0x0f, 0x00, 0xc9][..]),
        ("sldt", &[0x0f, 0x00, 0xc1]),
        ("smsw", &[0x0f, 0x01, 0xe1]),
        ("mov ecx, ds", &[0x8c, 0xd9]),
        ("push ds of 16 bits", &[0x66, 0x0f, 0xa0]),
    ] {
        guests.extend(everywhere(name, code, 0));
    }
    agree(
        guests,
        &[(
            "UserLong",
            "user code runs natively, with the host's segments",
        )],
    );
}

#[test]
fn table_registers() {
    let mut guests = Vec::new();
    for start in Start::ALL {
        // lgdt, lidt, sgdt, sidt [(r/e)bx] or, with 16-bit addresses, [bp+di]: see below
        for (name, modrm) in [("lgdt", 2), ("lidt", 3), ("sgdt", 0), ("sidt", 1)] {
            let rm = if start.bits() == 16 { 7 } else { 3 };
            let code = [0x0f, 0x01, modrm << 3 | rm];
            let mut guest = with_rax(name, start, &code, 0);
            guest.put(crate::layout::DATA, &[0xff, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn arpl() {
    let mut guests = Vec::new();
    for start in Start::ALL {
        if start.bits() != 64 {
            for (rax, rcx) in [(0x10, 3), (0x13, 1), (0x11, 1)] {
                let mut guest = with_rax("arpl", start, &[0x63, 0xc8], rax);
                guest.state.gpr[1] = rcx;
                guests.push(guest);
            }
        }
    }
    agree(guests, &[]);
}
