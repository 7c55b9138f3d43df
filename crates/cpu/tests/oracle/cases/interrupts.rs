//! Software interrupts through every kind of gate, and the way back.

use super::{agree, everywhere, with_rax};
use crate::layout::{HANDLERS, IDT, STACK, Start};

#[test]
fn through_every_gate() {
    let mut guests = Vec::new();
    for vector in [
        0x00, 0x08, 0x0d, 0x20, 0x80, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0xff,
    ] {
        guests.extend(everywhere(&format!("int {vector:#x}"), &[0xcd, vector], 0));
    }
    guests.extend(everywhere("int3", &[0xcc], 0));
    guests.extend(everywhere("int1", &[0xf1], 0));
    agree(guests, &[]);
}

#[test]
fn with_flags() {
    let mut guests = Vec::new();
    for flags in [0x0200, 0x3000, 0x3200, 0x4000, 0x4_0000, 0x0ed5] {
        for vector in [0x80, 0x83] {
            let name = format!("int {vector:#x} flags {flags:#x}");
            for mut guest in everywhere(&name, &[0xcd, vector], 0) {
                guest.state.rflags |= flags;
                guests.push(guest);
            }
        }
    }
    agree(guests, &[]);
}

#[test]
fn there_and_back() {
    let mut guests = Vec::new();
    for flags in [0x0, 0x3200] {
        for mut guest in everywhere(
            &format!("int 0x80, iret, flags {flags:#x}"),
            &[0xcd, 0x80],
            0,
        ) {
            guest.state.rflags |= flags;
            let iret: &[u8] = if guest.name.contains("Long") || guest.name.contains("Compat") {
                &[0x48, 0xcf]
            } else {
                &[0xcf]
            };
            guest.put(HANDLERS + 0x800, iret);
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn stacks_that_fault() {
    let mut guests = Vec::new();
    for (name, rsp) in [
        ("small", 2),
        ("zero", 0),
        ("odd", STACK - 3),
        ("high", 0xffff_fff1),
    ] {
        // The software KVM never comes back from a fault in a fault of real mode.
        for start in Start::ALL
            .into_iter()
            .filter(|start| start.has_descriptors())
        {
            let mut guest = with_rax(&format!("int 0x80, {name} stack"), start, &[0xcd, 0x80], 0);
            guest.state.gpr[4] = rsp;
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn tables_that_are_too_short() {
    let mut guests = Vec::new();
    for limit in [0, 0x3f, 0x7f, 0x103, 0x3ff] {
        for mut guest in everywhere(&format!("int 0x80, limit {limit:#x}"), &[0xcd, 0x80], 0) {
            guest.state.idtr.limit = limit;
            // The software KVM never comes back from a fault in a fault of real mode.
            if guest.state.cr0 & 1 != 0 {
                guests.push(guest);
            }
        }
    }
    agree(guests, &[]);
}

#[test]
fn handlers_that_are_not_there() {
    let mut guests = Vec::new();
    for mut guest in everywhere("ud2, no handler for it, for #NP, for #GP", &[0x0f, 0x0b], 0) {
        for vector in [6, 11, 13] {
            let size = if guest.name.contains("Long") || guest.name.contains("Compat") {
                16
            } else {
                8
            };
            guest.put(IDT + vector * size, &[0; 8]);
        }
        guests.push(guest);
    }
    agree(guests, &[]);
}
