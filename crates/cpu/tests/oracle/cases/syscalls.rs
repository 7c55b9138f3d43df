//! Fast system calls, `SWAPGS` and the segment-base instructions.

use super::{agree, everywhere};
use crate::layout::{HANDLERS, HLT};

#[test]
fn all() {
    let mut guests = Vec::new();
    for (name, code) in [
        ("syscall", &[0x0f, 0x05][..]),
        ("sysret", &[0x0f, 0x07]),
        ("sysretq", &[0x48, 0x0f, 0x07]),
        ("sysenter", &[0x0f, 0x34]),
        ("sysexit", &[0x0f, 0x35]),
        ("swapgs", &[0x0f, 0x01, 0xf8]),
        ("rdfsbase", &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
        ("wrgsbase", &[0xf3, 0x48, 0x0f, 0xae, 0xd8]),
    ] {
        for flags in [0, 0x3ed5] {
            for cr4 in [0, 1 << 16] {
                for mut guest in everywhere(&format!("{name} {flags:#x} {cr4:#x}"), code, 0x7000) {
                    guest.state.rflags |= flags;
                    guest.state.cr4 |= cr4;
                    guest.state.gpr[1] = 0x7800;
                    guest.state.gpr[2] = 0x7800;
                    guest.state.gpr[11] = 0x3_ffff_ffff;
                    guest.put(0x7800, &[HLT]);
                    let msrs = &mut guest.state.msrs;
                    msrs.star = 0x0023_0008_0000_7800;
                    msrs.lstar = HANDLERS + 0x100;
                    msrs.cstar = HANDLERS + 0x200;
                    msrs.sfmask = 0x700;
                    msrs.kernel_gs_base = 0x6000;
                    msrs.sysenter_cs = 8;
                    msrs.sysenter_esp = 0x9000;
                    msrs.sysenter_eip = HANDLERS + 0x300;
                    guests.push(guest);
                }
            }
        }
    }
    agree(
        guests,
        &[
            (
                "UserLong",
                "user code runs natively, with the host's registers",
            ),
            ("sysret 0", "EFER.SCE is not looked at"),
            ("sysret 0x3", "EFER.SCE is not looked at"),
            (
                "sysretq",
                "outside long mode it works, and EFER.SCE is not looked at",
            ),
            ("ompatibility: sysenter", "as on AMD, not in long mode"),
            ("swapgs", "outside 64-bit mode it works"),
            ("Long: rdfsbase", "CR4.FSGSBASE is not looked at"),
            ("Long: wrgsbase", "CR4.FSGSBASE is not looked at"),
        ],
    );
}
