//! Control and debug registers.

use super::{agree, everywhere};

#[test]
fn cr0() {
    let mut guests = Vec::new();
    for value in [
        0x11,
        0x10,
        0x1,
        0x8000_0011,
        0x2000_0011,
        0x6000_0011,
        0x8005_003b,
        0x8000_0010,
    ] {
        guests.extend(everywhere(
            &format!("mov cr0, {value:#x}"),
            &[0x0f, 0x22, 0xc0],
            value,
        ));
    }
    agree(guests, &[]);
}

#[test]
fn cr3_and_cr4() {
    let mut guests = Vec::new();
    for value in [0x20, 0xc000, 0xc018, 1 << 52, 1 << 63 | 0xc000] {
        guests.extend(everywhere(
            &format!("mov cr3, {value:#x}"),
            &[0x0f, 0x22, 0xd8],
            value,
        ));
    }
    for value in [
        0,
        0x20,
        0x620,
        0xff,
        1 << 12,
        1 << 17 | 0x20,
        1 << 31,
        1 << 15 | 0x20,
    ] {
        guests.extend(everywhere(
            &format!("mov cr4, {value:#x}"),
            &[0x0f, 0x22, 0xe0],
            value,
        ));
    }
    agree(guests, &[]);
}

#[test]
fn read() {
    let mut guests = Vec::new();
    for number in [0u8, 2, 3, 4] {
        let code = [0x0f, 0x20, 0xc0 | number << 3];
        guests.extend(everywhere(&format!("mov eax, cr{number}"), &code, 0));
    }
    guests.extend(everywhere("clts", &[0x0f, 0x06], 0));
    for value in [0, 1, 0xe, 0xffff] {
        guests.extend(everywhere(
            &format!("lmsw {value:#x}"),
            &[0x0f, 0x01, 0xf0],
            value,
        ));
    }
    agree(guests, &[]);
}

#[test]
fn debug_registers() {
    let mut guests = Vec::new();
    for number in 0..8u8 {
        let read = [0x0f, 0x21, 0xc0 | number << 3];
        let write = [0x0f, 0x23, 0xc0 | number << 3];
        for dr7 in [0x400, 0x2400] {
            for cr4 in [0, 8] {
                let tail = format!("{number}, dr7 {dr7:#x}, cr4 {cr4:#x}");
                let mut some = everywhere(&format!("mov eax, dr{tail}"), &read, 0);
                let to = format!("mov to dr{tail}");
                some.extend(everywhere(&to, &write, 0x1234));
                for mut guest in some {
                    guest.state.dr7 = dr7;
                    guest.state.cr4 |= cr4;
                    guests.push(guest);
                }
            }
        }
    }
    agree(guests, &[]);
}

#[test]
fn caches_and_translations() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("invlpg", &[0x0f, 0x01, 0x3b][..]),
        ("wbinvd", &[0x0f, 0x09]),
        ("cpuid", &[0x0f, 0xa2]),
        ("pause", &[0xf3, 0x90]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("rdpmc", &[0x0f, 0x33]),
    ] {
        guests.extend(everywhere(name, code, 0));
    }
    agree(
        guests,
        &[("UserLong: xgetbv", "user code sees the host's XCR0")],
    );
}
