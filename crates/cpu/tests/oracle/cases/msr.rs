//! Model-specific registers.

use super::agree;
use crate::cases::with_rax;
use crate::guest::Guest;
use crate::layout::Start;

fn access(name: &str, code: &[u8], start: Start, index: u32, value: u64) -> Guest {
    let name = format!("{name} {index:#x} {value:#x}");
    let mut guest = with_rax(&name, start, code, value & 0xffff_ffff);
    guest.state.gpr[1] = index.into();
    guest.state.gpr[2] = value >> 32;
    guest
}

#[test]
fn written_and_read() {
    let mut guests = Vec::new();
    for start in [
        Start::Real,
        Start::Protected32,
        Start::User32,
        Start::Long,
        Start::UserLong,
    ] {
        for index in [
            0x174,
            0x175,
            0x176,
            0x277,
            0xc000_0080,
            0xc000_0081,
            0xc000_0082,
            0xc000_0083,
            0xc000_0084,
            0xc000_0100,
            0xc000_0101,
            0xc000_0102,
            0xdead_beef,
        ] {
            for value in [
                0,
                1,
                0x501,
                0x0007_0406_0007_0406,
                1 << 47,
                0xffff_8000_0000_1234,
            ] {
                let code = [0x0f, 0x30, 0x0f, 0x32];
                guests.push(access("wrmsr; rdmsr", &code, start, index, value));
            }
        }
    }
    agree(
        guests,
        &[
            (" 0x174 ", "64 bits are kept"),
            (" 0x277 ", "reserved memory types are accepted"),
        ],
    );
}
