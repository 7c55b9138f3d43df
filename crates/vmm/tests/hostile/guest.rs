//! A guest that pokes: machine code that draws random numbers and, by them, writes to a port, reads
//! one, stores to or loads from a device's registers, scribbles over a page that serves as
//! virtqueues, or programs a virtio device with queues in that page and notifies it.
//!
//! It runs in long mode with the boot protocol's identity map of 4 GiB. The first vCPU starts the
//! second in the same loop, from a trampoline in low memory that goes round the low ports in real mode.

use super::garbage::Garbage;
pub(crate) use crate::kernel::{LOAD_AT, elf};

/// The page of virtqueues and those behind it: RAM.
const RINGS: u32 = 0x40_0000;
const WINDOW: u32 = 0xc000_0000;
const ECAM: u32 = 0xe000_0000;
const BAR_SIZE: u32 = 0x8000;
const LAPIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

/// The guest of this seed: a straight line of some thousand pokes, and a jump back to its start. The
/// numbers are drawn here rather than by the guest, so that every poke can be well aimed.
pub(crate) fn image(seed: u64) -> Vec<u8> {
    const POKES: usize = 3000;
    let mut garbage = Garbage::new(seed);
    let mut code = start_second_cpu();
    for _ in 0..POKES {
        poke(&mut code, &mut garbage);
    }
    let back = -(code.len() as i32 + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    elf(&code)
}

/// Copies a trampoline to 0x8000 and sends INIT and SIPI to vCPU 1.
fn start_second_cpu() -> Vec<u8> {
    // In real mode: in al, dx; inc dx; and dl, 0x5f; out dx, al; jmp back. For ever.
    const TRAMPOLINE: u64 = u64::from_le_bytes([0xec, 0x42, 0x80, 0xe2, 0x5f, 0xee, 0xeb, 0xf8]);
    let mut code = Vec::new();
    store(&mut code, 0x8000, 4, TRAMPOLINE);
    store(&mut code, 0x8004, 4, TRAMPOLINE >> 32);
    store(&mut code, LAPIC + 0x310, 4, 1 << 24);
    store(&mut code, LAPIC + 0x300, 4, 0x4500);
    store(&mut code, LAPIC + 0x300, 4, 0x4608);
    code
}

fn poke(code: &mut Vec<u8>, garbage: &mut Garbage) {
    match garbage.below(16) {
        0..3 => write_port(code, garbage),
        3 => read_port(code, garbage),
        4..7 => {
            let (at, size) = register(garbage);
            store(code, at, size, garbage.next());
        }
        7 => {
            let (at, size) = register(garbage);
            load(code, at, size);
        }
        8..11 => {
            let at = RINGS + garbage.below(0x4000) as u32 / 2 * 2;
            store(code, at, 2, garbage.next() % 0x20);
        }
        11..13 => descriptor(code, garbage),
        13 => interrupts(code, garbage),
        _ => program_queue(code, garbage),
    }
}

/// A port that is somebody's, or any; rarely one of those by which a machine is switched off or
/// reset: these end a life too soon.
fn port(garbage: &mut Garbage) -> u16 {
    let port = match garbage.below(8) {
        0 => 0x20 + garbage.below(2) as u16,
        1 => 0x40 + garbage.below(4) as u16,
        2 => 0x60 + garbage.below(0x20) as u16,
        3 => 0x3f8 + garbage.below(8) as u16,
        4 => 0x2f8 + garbage.below(8) as u16,
        5 => 0xcf8 + garbage.below(8) as u16,
        6 => 0x600 + garbage.below(12) as u16,
        _ => garbage.next() as u16,
    };
    match port {
        0x64 | 0x601..0x606 | 0xcf9 if garbage.below(200) > 0 => 0x80,
        port => port,
    }
}

/// `mov edx, PORT; mov eax, VALUE; out dx, al/ax/eax`
fn write_port(code: &mut Vec<u8>, garbage: &mut Garbage) {
    select(code, port(garbage), garbage.next() as u32);
    code.extend([&[0xee][..], &[0x66, 0xef], &[0xef]][garbage.below(3)]);
}

fn read_port(code: &mut Vec<u8>, garbage: &mut Garbage) {
    select(code, port(garbage), 0);
    code.extend([&[0xec][..], &[0x66, 0xed], &[0xed]][garbage.below(3)]);
}

fn select(code: &mut Vec<u8>, port: u16, value: u32) {
    code.push(0xba);
    code.extend(u32::from(port).to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
}

/// A register of a device on the PCI bus, or of its configuration.
fn register(garbage: &mut Garbage) -> (u32, usize) {
    let size = [1, 2, 4, 8][garbage.below(4)];
    let slot = garbage.below(4) as u32;
    let at = match garbage.below(8) {
        0 => ECAM + (slot << 15) + garbage.below(0x100) as u32,
        1 => WINDOW + garbage.below(0x20_0000) as u32,
        2..5 => WINDOW + slot * BAR_SIZE + garbage.below(0x38) as u32,
        5 => WINDOW + slot * BAR_SIZE + 0x3000 + garbage.below(0x10) as u32,
        6 => WINDOW + slot * BAR_SIZE + 0x4000 + garbage.below(0x40) as u32,
        _ => WINDOW + slot * BAR_SIZE + garbage.below(BAR_SIZE as usize) as u32,
    };
    (at, size)
}

/// Garbage for the interrupt controllers, but no message that would end both vCPUs' work.
fn interrupts(code: &mut Vec<u8>, garbage: &mut Garbage) {
    let select = garbage.below(0x40) as u64;
    store(code, IOAPIC, 4, select);
    // Masked, so that nothing is delivered to a guest without an IDT.
    store(code, IOAPIC + 0x10, 4, garbage.next() | 1 << 16);
    let at = [0x80, 0xd0, 0xe0, 0x280, 0x3e0, 0x380][garbage.below(6)];
    store(code, LAPIC + at, 4, garbage.next());
}

/// A descriptor somewhere in the rings' pages that points into RAM, or anywhere.
fn descriptor(code: &mut Vec<u8>, garbage: &mut Garbage) {
    let at = RINGS + garbage.below(64) as u32 * 16;
    let target = match garbage.below(4) {
        0 => garbage.next(),
        1 => u64::from(WINDOW),
        _ => u64::from(RINGS) + 0x1_0000 + garbage.below(0x10_0000) as u64,
    };
    store(code, at, 8, target);
    store(
        code,
        at + 8,
        4,
        [16, 512, 1, 0xffff_ffff, 4096][garbage.below(5)],
    );
    store(code, at + 12, 2, garbage.next() % 8);
    store(code, at + 14, 2, garbage.next() % 70);
}

/// Sets a queue up as a driver does, with the rings in the page, and notifies it.
fn program_queue(code: &mut Vec<u8>, garbage: &mut Garbage) {
    let bar = WINDOW + garbage.below(3) as u32 * BAR_SIZE;
    if garbage.below(4) == 0 {
        store(code, bar + 0x14, 1, 0);
    }
    store(code, bar + 0x14, 1, 3);
    store(code, bar + 0x08, 4, 1);
    store(code, bar + 0x0c, 4, 1);
    store(code, bar + 0x14, 1, 0xb);
    let queue = garbage.below(3) as u64;
    store(code, bar + 0x16, 2, queue);
    store(code, bar + 0x18, 2, 1 << garbage.below(7));
    for (register, offset) in [
        (0x20, 0),
        (0x28, 0x400 * garbage.below(16) as u64),
        (0x30, 0x2000),
    ] {
        store(code, bar + register, 8, u64::from(RINGS) + offset);
    }
    store(code, bar + 0x1c, 2, 1);
    store(code, bar + 0x14, 1, 0xf);
    store(code, bar + 0x3000 + 4 * queue as u32, 2, queue);
}

/// `mov rax, VALUE; mov ebx, AT; mov [rbx], al/ax/eax/rax`
fn store(code: &mut Vec<u8>, at: u32, size: usize, value: u64) {
    code.extend([0x48, 0xb8]);
    code.extend(value.to_le_bytes());
    point(code, at);
    code.extend(match size {
        1 => &[0x88, 0x03][..],
        2 => &[0x66, 0x89, 0x03],
        4 => &[0x89, 0x03],
        _ => &[0x48, 0x89, 0x03],
    });
}

/// `mov ebx, AT; mov al/ax/eax/rax, [rbx]`
fn load(code: &mut Vec<u8>, at: u32, size: usize) {
    point(code, at);
    code.extend(match size {
        1 => &[0x8a, 0x03][..],
        2 => &[0x66, 0x8b, 0x03],
        4 => &[0x8b, 0x03],
        _ => &[0x48, 0x8b, 0x03],
    });
}

fn point(code: &mut Vec<u8>, at: u32) {
    code.push(0xbb);
    code.extend(at.to_le_bytes());
}
