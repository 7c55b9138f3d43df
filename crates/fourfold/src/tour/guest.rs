//! The tour's guest: page tables, and twenty-odd instructions.
//!
//! | guest physical | what lies there                                                     |
//! |----------------|---------------------------------------------------------------------|
//! | `0x1000`       | PML4, then PDPT, PD, PT for the code (`0x2000`-`0x4000`)            |
//! | `0x5000`       | PD, PT for the data and the device (`0x5000`-`0x6000`)              |
//! | `0x8000`       | the code, at the same guest virtual address                         |
//! | `0x200000`     | the data page, at guest virtual [`DATA`]                            |
//! | `0x201000`     | a buffer that a device fills, at guest virtual [`BUFFER_VIEW`]      |
//! | `0xd0000000`   | the device, in no memslot, at guest virtual [`DEVICE`]              |

use addr::{Gpa, Gva};

/// The guest's RAM in bytes.
pub(super) const RAM: u64 = 64 << 20;
/// Where CR3 points.
pub(super) const PML4: Gpa = Gpa::new(0x1000);
/// Where the guest begins.
pub(super) const CODE: Gva = Gva::new(0x8000);
/// The address that the tour follows.
pub(super) const DATA: Gva = Gva::new(0x12_3456_7000);
/// The page behind it.
pub(super) const DATA_PAGE: Gpa = Gpa::new(0x20_0000);
/// Where the guest finds its device.
pub(super) const DEVICE: Gva = Gva::new(0x12_3456_8000);
/// The same in guest physical memory: in no memslot.
pub(super) const DEVICE_PAGE: Gpa = Gpa::new(0xd000_0000);
/// The buffer whose address the guest gives to the device.
pub(super) const BUFFER: Gpa = Gpa::new(0x20_1000);
/// Where the guest sees that buffer.
pub(super) const BUFFER_VIEW: Gva = Gva::new(0x12_3456_9000);

/// Ports by which the guest says how far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Port {
    /// The clock was read twice with nothing between; R9 holds the cycles that it took.
    Clock = 0x0f,
    /// What RBX points to was read once; R9 holds the cycles that it took. This part runs three
    /// times: on the code's own page, so that the CPU has met the instructions before; then twice
    /// on the data page.
    Touch = 0x10,
    /// The data page was read as many times more as EDI said; likewise.
    Loop = 0x12,
    /// The device has answered; R10 holds what it said, RAX the buffer's first bytes.
    Device = 0x13,
    /// The data page was written.
    FirstWrite = 0x14,
    /// It was written again.
    SecondWrite = 0x15,
}

const PRESENT_WRITABLE: u64 = 0b11;

/// Entries of the guest's tables: where, and what.
pub(super) fn page_tables() -> Vec<(Gpa, u64)> {
    let index = |gva: Gva, level: u32| (gva.raw() >> (12 + 9 * (level - 1))) & 511;
    let entry = |table: u64, gva: Gva, level: u32, to: u64| {
        let at = Gpa::new(table + 8 * index(gva, level));
        (at, to | PRESENT_WRITABLE)
    };
    vec![
        entry(0x1000, CODE, 4, 0x2000),
        entry(0x2000, CODE, 3, 0x3000),
        entry(0x3000, CODE, 2, 0x4000),
        entry(0x4000, CODE, 1, CODE.raw()),
        entry(0x2000, DATA, 3, 0x5000),
        entry(0x5000, DATA, 2, 0x6000),
        entry(0x6000, DATA, 1, DATA_PAGE.raw()),
        entry(0x6000, DEVICE, 1, DEVICE_PAGE.raw()),
        entry(0x6000, BUFFER_VIEW, 1, BUFFER.raw()),
    ]
}

/// The program. RBX holds [`DATA`] (or [`CODE`] at first), RSI [`DEVICE`], RBP [`BUFFER_VIEW`], EDI how often to read.
pub(super) fn code() -> Vec<u8> {
    const READ: &[u8] = &[0x48, 0x8b, 0x0b]; // mov rcx, [rbx]
    // mov ecx, edi; again: mov rdx, [rbx]; dec ecx; jnz again
    const READ_LOOP: &[u8] = &[0x89, 0xf9, 0x48, 0x8b, 0x13, 0xff, 0xc9, 0x75, 0xf9];
    const WRITE: &[u8] = &[0x48, 0x89, 0x4b, 0x08]; // mov [rbx + 8], rcx
    let mut code = Vec::new();
    timed(&mut code, &[]);
    say(&mut code, Port::Clock);
    timed(&mut code, READ);
    say(&mut code, Port::Touch);
    timed(&mut code, READ_LOOP);
    say(&mut code, Port::Loop);
    code.extend([0xc7, 0x06]); // mov dword [rsi], BUFFER
    code.extend((BUFFER.raw() as u32).to_le_bytes());
    code.extend([0x44, 0x8b, 0x16]); // mov r10d, [rsi]
    code.extend([0x48, 0x8b, 0x45, 0x00]); // mov rax, [rbp]
    say(&mut code, Port::Device);
    code.extend(WRITE);
    say(&mut code, Port::FirstWrite);
    code.extend(WRITE);
    say(&mut code, Port::SecondWrite);
    code.push(0xf4); // hlt
    code
}

/// Runs `instructions` between two readings of the time-stamp counter; R9 becomes the cycles.
fn timed(code: &mut Vec<u8>, instructions: &[u8]) {
    // rdtsc; shl rdx, 32; or rax, rdx
    const NOW: &[u8] = &[0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0];
    code.extend(NOW);
    code.extend([0x49, 0x89, 0xc0]); // mov r8, rax
    code.extend(instructions);
    code.extend(NOW);
    code.extend([0x4c, 0x29, 0xc0, 0x49, 0x89, 0xc1]); // sub rax, r8; mov r9, rax
}

/// `out PORT, al`
fn say(code: &mut Vec<u8>, port: Port) {
    code.extend([0xe6, port as u8]);
}
