//! Far jumps, calls, returns and `IRET`.

use super::{SELECTORS, agree, with_rax};
use crate::guest::Guest;
use crate::layout::{HANDLERS, HLT, STACK, Start, sel};

fn target(opcode: u8, start: Start, offset: u32, selector: u16) -> Vec<u8> {
    let mut code = vec![opcode];
    if start.bits() == 16 {
        code.extend((offset as u16).to_le_bytes());
    } else {
        code.extend(offset.to_le_bytes());
    }
    code.extend(selector.to_le_bytes());
    code
}

/// All modes, all selectors; the target is a `HLT` at 0x7800.
fn direct(name: &str, opcode: u8) {
    let mut guests = Vec::new();
    for start in Start::ALL.into_iter().filter(|start| start.bits() != 64) {
        for selector in SELECTORS {
            let code = target(opcode, start, 0x7800, selector);
            let mut guest = with_rax(&format!("{name} {selector:#x}"), start, &code, 0);
            guest.put(0x7800, &[HLT]);
            if !start.has_descriptors() {
                let at = usize::from(selector) * 16 + 0x7800;
                if at < guest.memory.len() {
                    guest.memory[at] = HLT;
                }
            }
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn jumps() {
    direct("jmp far", 0xea);
}

#[test]
fn calls() {
    direct("call far", 0x9a);
}

#[test]
fn indirect() {
    let mut guests = Vec::new();
    for start in [
        Start::Long,
        Start::UserLong,
        Start::Protected32,
        Start::User32,
    ] {
        for selector in SELECTORS {
            for (name, modrm) in [("jmp far [rbx]", 0x2b), ("call far [rbx]", 0x1b)] {
                let name = format!("{name} {selector:#x}");
                let mut guest = with_rax(&name, start, &[0xff, modrm], 0);
                guest.put(crate::layout::DATA, &0x7800u32.to_le_bytes());
                guest.put(crate::layout::DATA + 4, &selector.to_le_bytes());
                guest.put(0x7800, &[HLT]);
                guests.push(guest);
            }
        }
    }
    agree(guests, &[]);
}

/// Slots of the stack in the width of the mode.
fn push(guest: &mut Guest, width: usize, slots: &[u64]) {
    let top = STACK - 0x100;
    guest.state.gpr[4] = top;
    for (n, slot) in slots.iter().enumerate() {
        guest.put(top + (n * width) as u64, &slot.to_le_bytes()[..width]);
    }
}

fn stack_width(start: Start) -> usize {
    // RETF and IRET of 64-bit code have 32-bit operands without REX.W.
    if start.bits() == 16 { 2 } else { 4 }
}

#[test]
fn returns() {
    let mut guests = Vec::new();
    for start in Start::ALL {
        for selector in SELECTORS {
            let mut guest = with_rax(&format!("retf {selector:#x}"), start, &[0xcb], 0);
            let width = stack_width(start);
            push(
                &mut guest,
                width,
                &[0x7800, selector.into(), 0x7f80, sel::USER_DATA32.into()],
            );
            guest.put(0x7800, &[HLT]);
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn interrupt_returns() {
    let mut guests = Vec::new();
    for start in Start::ALL {
        for selector in SELECTORS {
            for flags in [0x2, 0x3246, 0x4_4ed7] {
                let name = format!("iret to {selector:#x} flags {flags:#x}");
                let mut guest = with_rax(&name, start, &[0xcf], 0);
                let width = stack_width(start);
                let stack = u64::from(sel::USER_DATA32);
                push(
                    &mut guest,
                    width,
                    &[0x7800, selector.into(), flags, 0x7f80, stack],
                );
                guest.put(0x7800, &[HLT]);
                guests.push(guest);
            }
        }
    }
    agree(
        guests,
        &[
            (
                "Compatibility: iret",
                "the emulator pops SS and RSP in compatibility mode too",
            ),
            (
                "Long: iret",
                "the stack segment is not checked; data segments survive",
            ),
        ],
    );
}

#[test]
fn interrupt_returns_of_64_bits() {
    let mut guests = Vec::new();
    for start in [Start::Long, Start::UserLong] {
        for cs in [
            0,
            sel::CODE32,
            sel::CODE64,
            sel::USER_CODE32,
            sel::USER_CODE64,
        ] {
            for ss in SELECTORS {
                let name = format!("iretq to {cs:#x} stack {ss:#x}");
                let mut guest = with_rax(&name, start, &[0x48, 0xcf], 0);
                push(
                    &mut guest,
                    8,
                    &[0x7800, cs.into(), 0x3202, 0x7f80, ss.into()],
                );
                guest.put(0x7800, &[HLT]);
                guests.push(guest);
            }
        }
        for rip in [1 << 47, 0xffff_8000_0000_0000, u64::MAX] {
            let mut guest = with_rax(&format!("iretq rip {rip:#x}"), start, &[0x48, 0xcf], 0);
            let ss = sel::USER_DATA32.into();
            push(
                &mut guest,
                8,
                &[rip, sel::USER_CODE64.into(), 2, 0x7f80, ss],
            );
            guests.push(guest);
        }
    }
    agree(
        guests,
        &[
            ("iretq to 0x8 stack", "the stack segment is not checked"),
            (
                "iretq to 0x1b stack",
                "the stack segment is not checked; data segments survive",
            ),
            (
                "iretq to 0x33 stack",
                "the stack segment is not checked; data segments survive",
            ),
            (
                "iretq to 0x28 stack",
                "the stack segment is not checked in the manual's order",
            ),
            ("iretq rip", "RIP is checked in user mode"),
            ("UserLong: iretq", "user code runs with the host's tables"),
        ],
    );
}

#[test]
fn to_virtual_8086_mode() {
    let mut guests = Vec::new();
    for start in [Start::Protected32, Start::Paged32] {
        for flags in [0x2_0002, 0x2_3202, 0x2_0202] {
            let mut guest = with_rax(&format!("iret flags {flags:#x}"), start, &[0xcf], 0);
            let slots = [0x800, 0x700, flags, 0xff0, 0x600, 0x11, 0x22, 0x33, 0x44];
            push(&mut guest, 4, &slots);
            // int 0x21; hlt
            guest.put(0x7800, &[0xcd, 0x21, HLT]);
            guests.push(guest);
        }
    }
    agree(guests, &[]);
}

#[test]
fn call_gate_and_return() {
    let mut guests = Vec::new();
    for start in [Start::User32, Start::Protected32, Start::Paged32] {
        let code = target(0x9a, start, 0, sel::GATE);
        let mut guest = with_rax("call gate, retf 8", start, &code, 0);
        guest.put(HANDLERS + 0xfe0, &[0xca, 8, 0]);
        guest.state.gpr[4] = STACK - 0x40;
        guest.put(STACK - 0x40, &[1, 2, 3, 4, 5, 6, 7, 8]);
        guests.push(guest);
    }
    agree(guests, &[]);
}
