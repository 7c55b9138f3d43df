//! Ports.

use super::{agree, everywhere};

#[test]
fn single() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("in al, dx", &[0xec][..]),
        ("in eax, dx", &[0xed]),
        ("out dx, al", &[0xee]),
        ("out dx, eax", &[0xef]),
        ("in al, 0x60", &[0xe4, 0x60]),
        ("insb", &[0x6c]),
        ("outsb", &[0x6e]),
    ] {
        for port in [0x60, 0xff, 0x100, 0x17e, 0x17f, 0x3f8, 0xffff] {
            for flags in [0, 0x3000] {
                for mut guest in everywhere(
                    &format!("{name}, port {port:#x}, {flags:#x}"),
                    code,
                    0x1122_3344,
                ) {
                    guest.state.gpr[2] = port;
                    guest.state.rflags |= flags;
                    guests.push(guest);
                }
            }
        }
    }
    agree(guests, &[("UserLong", "user code has no I/O privileges")]);
}
