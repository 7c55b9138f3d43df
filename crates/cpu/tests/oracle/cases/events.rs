//! Interrupts, NMIs and the monitor's own debugging.

use cpu::system::GuestDebug;

use super::{agree, everywhere};
use crate::layout::HLT;

#[test]
fn non_maskable() {
    let mut guests = everywhere("nmi", &[0x90, 0x90], 0);
    for guest in &mut guests {
        guest.wishes.nmi = true;
    }
    agree(guests, &[]);
}

#[test]
fn monitors_steps() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("nops", &[0x90, 0x90][..]),
        ("jmp", &[0xeb, 0x01, HLT, 0x90]),
        ("push; pop", &[0x50, 0x58]),
        ("out", &[0xe6, 0x60, 0x90]),
        ("int3", &[0x90, 0xcc, 0x90]),
    ] {
        for mut guest in everywhere(&format!("monitor steps over {name}"), code, 0) {
            guest.wishes.debug = GuestDebug {
                enabled: true,
                single_step: true,
                ..GuestDebug::default()
            };
            guests.push(guest);
        }
    }
    agree(
        guests,
        &[(
            "User",
            "user code is stepped into the handler's level, or not at all",
        )],
    );
}

#[test]
fn monitors_breakpoints() {
    let mut guests = Vec::new();
    for (name, dr7) in [("execute", 0x402), ("write", 0xd_0402)] {
        let code = [0x90, 0x90, 0x90];
        for mut guest in everywhere(&format!("monitor watches {name}"), &code, 0) {
            guest.wishes.debug = GuestDebug {
                enabled: true,
                hardware_breakpoints: true,
                dr: [0x7001, 0, 0, 0],
                dr7,
                ..GuestDebug::default()
            };
            guests.push(guest);
        }
    }
    agree(guests, &[("UserLong", "user code has no breakpoints")]);
}
