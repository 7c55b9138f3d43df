//! Locked updates: within a line, across lines, across pages that lie apart, beside code; a lock.

use super::threads::{Program, machine, run};
use crate::machine::{DATA, Machine};

const RDI: usize = 7;
const ROUNDS: u64 = 20_000;

/// Two neighbouring pages of the guest that lie a MiB apart in RAM: `APART` and the one behind it.
const APART: u64 = 0x4000_0000;
const FIRST: u64 = 0x80_0000;
const SECOND: u64 = 0x90_0000;

fn map_apart(machine: &Machine) {
    machine.write_word(0x2008, 0x4007);
    machine.write_word(0x4000, 0x5007);
    machine.write_word(0x5000, FIRST | 7);
    machine.write_word(0x5008, SECOND | 7);
}

/// Rounds of updates that need no help, beside `ROUNDS` that do.
const PLAIN_ROUNDS: u64 = 3_000_000;

/// `mov ecx, rounds; l: <update>; dec ecx; jnz l; hlt`
fn repeat(update: &[u8], rounds: u64) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend((rounds as u32).to_le_bytes());
    code.extend(update);
    code.extend([0xff, 0xc9, 0x75, (-(update.len() as i8) - 4) as u8, 0xf4]);
    code
}

const LOCK_INC_QWORD: [u8; 4] = [0xf0, 0x48, 0xff, 0x07]; // lock incq (%rdi)
const LOCK_INC_DWORD: [u8; 3] = [0xf0, 0xff, 0x07]; // lock incl (%rdi)

/// An update, where, and how often.
type Update<'a> = (&'a [u8], u64, u64);

/// All vCPUs run their updates.
fn all(machine: &Machine, vcpus: &mut [cpu::Vcpu], updates: &[Update<'_>]) {
    let code: Vec<_> = updates.iter().map(|(u, _, n)| repeat(u, *n)).collect();
    let registers: Vec<_> = updates.iter().map(|(_, at, _)| [(RDI, *at)]).collect();
    let programs: Vec<_> = code
        .iter()
        .zip(&registers)
        .map(|(code, registers)| Program { code, registers })
        .collect();
    run(machine, vcpus, &programs);
}

fn bytes_at(machine: &Machine, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    machine.read(at, &mut bytes);
    bytes
}

/// The eight bytes at the end of the first page and the start of the second.
fn split_word(machine: &Machine, in_first: usize) -> u64 {
    let mut bytes = bytes_at(machine, FIRST + 4096 - in_first as u64, in_first);
    bytes.extend(bytes_at(machine, SECOND, 8 - in_first));
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[test]
fn within_a_line_and_across_lines() {
    for offset in [0, 3, 60] {
        let (machine, mut vcpus) = machine(3);
        let update = (&LOCK_INC_QWORD[..], DATA + offset, ROUNDS);
        all(&machine, &mut vcpus, &[update; 3]);
        let bytes = bytes_at(&machine, DATA + offset, 8);
        let count = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        assert_eq!(count, 3 * ROUNDS, "at {offset}");
    }
}

#[test]
fn across_pages_that_lie_apart() {
    for in_first in [1, 4, 7] {
        let (machine, mut vcpus) = machine(3);
        map_apart(&machine);
        let at = APART + 4096 - in_first as u64;
        all(
            &machine,
            &mut vcpus,
            &[(&LOCK_INC_QWORD[..], at, ROUNDS); 3],
        );
        assert_eq!(split_word(&machine, in_first), 3 * ROUNDS, "{in_first}");
    }
}

/// One vCPU's operand crosses; the others' are ordinary locked words in one of its two pages.
#[test]
fn across_pages_beside_ordinary_ones() {
    let (machine, mut vcpus) = machine(3);
    map_apart(&machine);
    let at = APART + 4096 - 4;
    let updates = [
        (&LOCK_INC_QWORD[..], at, ROUNDS),
        (&LOCK_INC_DWORD[..], at, PLAIN_ROUNDS),
        (&LOCK_INC_DWORD[..], at + 4, PLAIN_ROUNDS),
    ];
    all(&machine, &mut vcpus, &updates);
    let halves = PLAIN_ROUNDS << 32 | (ROUNDS + PLAIN_ROUNDS);
    assert_eq!(split_word(&machine, 4), halves);
}

/// A plain store of another vCPU never falls between the read and the write of a locked update:
/// the sum would be taken back.
#[test]
fn across_pages_beside_plain_stores() {
    let (machine, mut vcpus) = machine(2);
    map_apart(&machine);
    // The first adds 2^32 to the eight bytes, which leaves the lower half as it is.
    let add = [0xf0, 0x48, 0x01, 0x07]; // lock add %rax,(%rdi)
    let adds = repeat(&add, ROUNDS);
    // The second counts in the lower half and looks whether its own value is still there.
    let counts = repeat(
        &[
            0x89, 0x0f, // mov %ecx,(%rdi)
            0x90, 0x90, 0x90, 0x90, // nop
            0x3b, 0x0f, // cmp (%rdi),%ecx
            0x74, 0x01, // je over
            0xf4, // hlt
        ],
        PLAIN_ROUNDS,
    );
    let at = APART + 4096 - 4;
    let programs = [
        Program {
            code: &adds,
            registers: &[(RDI, at), (0, 1 << 32)],
        },
        Program {
            code: &counts,
            registers: &[(RDI, at)],
        },
    ];
    run(&machine, &mut vcpus, &programs);
    assert_eq!(vcpus[1].state().gpr[1], 0, "a store was lost");
    assert_eq!(split_word(&machine, 4), ROUNDS << 32 | 1);
}

/// Operands in a page with translated code, which no vCPU may write directly.
#[test]
fn beside_code() {
    let beside = super::threads::code_of(0) + 0x800;
    for update in [&LOCK_INC_QWORD[..], &LOCK_INC_DWORD[..]] {
        let (machine, mut vcpus) = machine(3);
        all(&machine, &mut vcpus, &[(update, beside, ROUNDS); 3]);
        assert_eq!(machine.word(beside), 3 * ROUNDS);
    }
}

/// `lock cmpxchg16b`, which the host can't do for an operand in such a page by a compare and exchange of
/// eight bytes.
#[test]
fn sixteen_bytes_beside_code() {
    let (machine, mut vcpus) = machine(3);
    let beside = super::threads::code_of(0) + 0x800;
    // The count of rounds is in r8, as cmpxchg16b takes rcx.
    let code = [
        0x41, 0xb8, 0xd0, 0x07, 0, 0, // mov $2000,%r8d
        0x48, 0x8b, 0x07, // mov (%rdi),%rax
        0x48, 0x8b, 0x57, 0x08, // mov 8(%rdi),%rdx
        0x48, 0x8d, 0x58, 0x01, // retry: lea 1(%rax),%rbx
        0x48, 0x8d, 0x4a, 0x01, // lea 1(%rdx),%rcx
        0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b (%rdi)
        0x75, 0xf1, // jne retry
        0x41, 0xff, 0xc8, // dec %r8d
        0x75, 0xec, // jne retry
        0xf4,
    ];
    let registers = [(RDI, beside)];
    let programs = [(); 3].map(|()| Program {
        code: &code,
        registers: &registers,
    });
    run(&machine, &mut vcpus, &programs);
    assert_eq!(machine.word(beside), 6000);
    assert_eq!(machine.word(beside + 8), 6000);
}

/// A spin lock around an increment that is not locked itself.
#[test]
fn a_spin_lock() {
    let (machine, mut vcpus) = machine(2);
    let code = repeat(
        &[
            0xf0, 0x0f, 0xba, 0x2f, 0x00, // try: lock bts $0,(%rdi)
            0x73, 0x04, // jnc taken
            0xf3, 0x90, // pause
            0xeb, 0xf5, // jmp try
            0x48, 0xff, 0x47, 0x40, // taken: incq 64(%rdi)
            0xc6, 0x07, 0x00, // movb $0,(%rdi)
        ],
        ROUNDS,
    );
    let registers = [(RDI, DATA)];
    let programs = [(); 2].map(|()| Program {
        code: &code,
        registers: &registers,
    });
    run(&machine, &mut vcpus, &programs);
    assert_eq!(machine.word(DATA + 64), 2 * ROUNDS);
}
