//! Task switches.

use super::{agree, with_rax};
use crate::layout::{HANDLERS, Start, TSS2, sel};

fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let mut code = vec![opcode, 0, 0, 0, 0];
    code.extend(selector.to_le_bytes());
    code
}

#[test]
fn by_jump_call_gate_and_interrupt() {
    let mut guests = Vec::new();
    for start in [Start::Protected32, Start::User32, Start::Paged32] {
        for (name, code) in [
            ("jmp tss", far(0xea, sel::TSS2)),
            ("call tss", far(0x9a, sel::TSS2)),
            ("jmp task gate", far(0xea, sel::TASK_GATE)),
            ("call task gate", far(0x9a, sel::TASK_GATE)),
            ("int 0x85", vec![0xcd, 0x85]),
            ("jmp busy", far(0xea, sel::TSS)),
        ] {
            let mut guest = with_rax(name, start, &code, 0x1234_5678);
            // hlt: the second task ends here
            guest.put(HANDLERS + 0xff0, &[0xf4]);
            if start == Start::Paged32 {
                let directory = crate::layout::DIRECTORY32 as u32;
                guest.put(TSS2 + 28, &directory.to_le_bytes());
            }
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn there_and_back() {
    let mut guests = Vec::new();
    for start in [Start::Protected32, Start::User32] {
        for (name, code) in [
            ("call", far(0x9a, sel::TASK_GATE)),
            ("int", vec![0xcd, 0x85]),
        ] {
            let mut guest = with_rax(&format!("{name}, iret"), start, &code, 0x1234_5678);
            guest.put(HANDLERS + 0xff0, &[0xcf]);
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn that_fail() {
    let mut guests = Vec::new();
    for (name, at, value) in [
        ("null code", 76u64, 0u16),
        ("data as code", 76, sel::DATA32),
        ("read-only stack", 80, sel::READ_ONLY),
        ("user stack", 80, sel::USER_DATA32),
        ("absent data", 84, sel::ABSENT_DATA | 3),
        ("code outside", 76, sel::OUTSIDE),
        ("ldt is a tss", 96, sel::TSS),
        ("ldt", 96, sel::LDT),
    ] {
        let start = Start::Protected32;
        let mut guest = with_rax(name, start, &far(0xea, sel::TSS2), 0);
        guest.put(HANDLERS + 0xff0, &[0xf4]);
        guest.put(TSS2 + at, &value.to_le_bytes());
        guests.push(guest);
    }
    agree(guests, &[]);
}
