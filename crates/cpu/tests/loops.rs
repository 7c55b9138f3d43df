//! Loops whose accesses cross pages of all kinds.

mod machine;

use cpu::Exit;
use machine::{CODE, DATA, Machine, RAM_BYTES};

/// Guest addresses beyond what is mapped one to one, in 4 KiB pages.
const SCATTERED: u64 = 0x4000_0000;
const PAGES: u64 = 16;
const BYTES: u64 = PAGES * 4096;

/// l: mov rax, [rsi+rcx*8]; mov [rdi+rcx*8+16], rax; inc rcx; cmp rcx, rdx; jb l; hlt
const COPY: [u8; 18] = [
    0x48, 0x8b, 0x04, 0xce, 0x48, 0x89, 0x44, 0xcf, 0x10, 0x48, 0xff, 0xc1, 0x48, 0x39, 0xd1, 0x72,
    0xef, 0xf4,
];

/// Where a scattered page lies: pairs lie side by side, the rest is shuffled.
fn place(page: u64) -> u64 {
    DATA + (page / 2 * 5 % (PAGES / 2) * 2 + page % 2) * 4096
}

fn scatter(machine: &Machine) {
    machine.write_word(0x2008, 0x4007);
    machine.write_word(0x4000, 0x5007);
    for page in 0..PAGES {
        machine.write_word(0x5000 + 8 * page, place(page) | 7);
    }
}

fn write_scattered(machine: &Machine, bytes: &[u8]) {
    for (page, bytes) in bytes.chunks(4096).enumerate() {
        machine.write(place(page as u64), bytes);
    }
}

fn read_scattered(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    for (page, bytes) in bytes.chunks_mut(4096).enumerate() {
        machine.read(place(page as u64), bytes);
    }
    bytes
}

#[test]
fn copies_across_scattered_pages() {
    let mut machine = Machine::new(&COPY);
    scatter(&machine);
    for (from, to, count) in [
        (0, 0x8000, 0xffc),
        (0x7f8, 0x8000, 0xe00),
        (3, 0x8005, 0xff0),
        (0x1ff9, 0x9002, 2),
        (0x100, 0x0f8, 0x1800),
        (0x800, 0x7ec, 0x1800),
    ] {
        let mut expected: Vec<u8> = (0..BYTES).map(|i| ((i * 0x9e37) >> 7) as u8).collect();
        write_scattered(&machine, &expected);
        for i in 0..count as usize {
            let from = from as usize + 8 * i;
            expected.copy_within(from..from + 8, to as usize + 16 + 8 * i);
        }
        let state = machine.vcpu.state_mut();
        state.rip = CODE;
        state.gpr[1] = 0;
        state.gpr[2] = count;
        state.gpr[6] = SCATTERED + from;
        state.gpr[7] = SCATTERED + to;
        assert_eq!(machine.run_to_halt().gpr[1], count);
        let found = read_scattered(&machine);
        assert!(found == expected, "{from:x} to {to:x}, {count:x} words");
    }
}

#[test]
fn a_loop_comes_to_a_device() {
    for target in [6, 7] {
        let mut machine = Machine::new(&COPY);
        let state = machine.vcpu.state_mut();
        state.gpr[1] = 0;
        state.gpr[2] = 0x1000;
        state.gpr[6] = DATA;
        state.gpr[7] = DATA - 16;
        state.gpr[target] += RAM_BYTES - DATA - 0x2f00;
        let exit = machine.run();
        let Exit::Mmio(asked) = exit else {
            panic!("{exit:?}");
        };
        assert_eq!(asked.gpa.raw(), RAM_BYTES);
        assert_eq!(asked.write.is_some(), target == 7);
        let state = machine.vcpu.state();
        assert_eq!(state.gpr[1], 0x2f00 / 8);
        assert_eq!(state.rip, CODE + if target == 7 { 9 } else { 0 });
    }
}

#[test]
fn a_loop_writes_over_code() {
    // f: mov al, 1; ret
    // start: call f; l: mov byte [rdi+rcx], 0xc3; inc rcx; cmp rcx, rdx; jb l; call f; hlt
    let code = [
        0xb0, 1, 0xc3, 0xe8, 0xf8, 0xff, 0xff, 0xff, 0xc6, 0x04, 0x0f, 0xc3, 0x48, 0xff, 0xc1,
        0x48, 0x39, 0xd1, 0x72, 0xf4, 0xe8, 0xe7, 0xff, 0xff, 0xff, 0xf4,
    ];
    let mut machine = Machine::new(&code);
    for count in [0x2000, 0x2001] {
        machine.write(CODE, &code);
        let state = machine.vcpu.state_mut();
        state.rip = CODE + 3;
        state.gpr[0] = 0;
        state.gpr[1] = 0;
        state.gpr[2] = count;
        state.gpr[7] = CODE - 0x2000;
        // The first call sets AL; the second finds a RET where the loop went far enough.
        machine.vcpu.state_mut().gpr[4] = machine::STACK;
        let state = machine.run_to_halt();
        assert_eq!((state.gpr[0], state.gpr[1]), (1, count));
        let mut first = [0];
        machine.read(CODE, &mut first);
        assert_eq!(first[0] == 0xc3, count > 0x2000);
    }
}

/// l: add al, [rdi]; mov [rdi+rcx], al; inc rcx; cmp rcx, rdx; jb l; hlt: what one stream writes the
/// other reads.
#[test]
fn streams_that_meet() {
    let code = [
        0x02, 0x07, 0x88, 0x04, 0x0f, 0x48, 0xff, 0xc1, 0x48, 0x39, 0xd1, 0x72, 0xf3, 0xf4,
    ];
    let mut machine = Machine::new(&code);
    let mut expected: Vec<u8> = (0..0x3000).map(|i| i as u8 | 1).collect();
    machine.write(DATA, &expected);
    let mut al = 0u8;
    for i in 0..0x3000 {
        al = al.wrapping_add(expected[0]);
        expected[i] = al;
    }
    let state = machine.vcpu.state_mut();
    (state.gpr[0], state.gpr[1], state.gpr[2], state.gpr[7]) = (0, 0, 0x3000, DATA);
    assert_eq!(machine.run_to_halt().gpr[0], u64::from(al));
    let mut found = vec![0; 0x3000];
    machine.read(DATA, &mut found);
    assert!(found == expected);
}

/// stc, or clc; l: mov rax, [rdi+rax]; dec rsi; jnz l; setc bl; hlt
fn chase(carry: u8) -> [u8; 14] {
    [
        carry, 0x48, 0x8b, 0x04, 0x07, 0x48, 0xff, 0xce, 0x75, 0xf7, 0x0f, 0x92, 0xc3, 0xf4,
    ]
}

#[test]
fn a_carry_from_before_the_loop() {
    for (instruction, carry) in [(0xf9, 1), (0xf8, 0)] {
        let mut machine = Machine::new(&chase(instruction));
        // A ring through many pages, at odd distances.
        let places: Vec<u64> = (0..500).map(|i| i * 3001 % 0x20000 * 8).collect();
        for (at, next) in places.iter().zip(places.iter().cycle().skip(1)) {
            machine.write_word(DATA + at, *next);
        }
        for rounds in [1, 2, 3, 500, 5000] {
            let state = machine.vcpu.state_mut();
            (state.rip, state.gpr[0], state.gpr[3]) = (CODE, 0, 0);
            (state.gpr[6], state.gpr[7]) = (rounds, DATA);
            let state = machine.run_to_halt();
            assert_eq!(
                (state.gpr[0], state.gpr[3]),
                (places[rounds as usize % 500], carry)
            );
        }
        // The ring leads out of RAM: the flags at the exit are those of the last DEC, and the carry.
        machine.write_word(DATA + places[100], RAM_BYTES - DATA);
        let state = machine.vcpu.state_mut();
        (state.rip, state.gpr[0], state.gpr[6]) = (CODE, 0, 5000);
        let exit = machine.run();
        assert!(matches!(exit, Exit::Mmio(_)), "{exit:?}");
        let state = machine.vcpu.state();
        assert_eq!((state.rip, state.gpr[6]), (CODE + 1, 5000 - 101));
        assert_eq!(state.rflags & 1, carry);
    }
}

/// A loop that goes downwards, with an index that moves and a base that doesn't, then the reverse.
#[test]
fn downwards_and_by_either_register() {
    // l: add rax, [rdi+rcx]; add rax, [rcx+rsi-8]; sub rcx, 8; cmp rcx, rdx; jne l; hlt
    let code = [
        0x48, 0x03, 0x04, 0x0f, 0x48, 0x03, 0x44, 0x31, 0xf8, 0x48, 0x83, 0xe9, 0x08, 0x48, 0x39,
        0xd1, 0x75, 0xee, 0xf4,
    ];
    let mut machine = Machine::new(&code);
    scatter(&machine);
    let bytes: Vec<u8> = (0..BYTES).map(|i| ((i * 0x9e37) >> 7) as u8).collect();
    write_scattered(&machine, &bytes);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    for (first, last) in [(0xf000u64, 0x10u64), (0x5004, 0x8), (0x2ff9, 0x1ff1 + 8)] {
        let last = first - (first - last) / 8 * 8;
        let mut sum = 0u64;
        let mut at = first;
        while at != last {
            sum = sum.wrapping_add(word(at as usize));
            sum = sum.wrapping_add(word(at as usize - 8 + 0x20));
            at -= 8;
        }
        let state = machine.vcpu.state_mut();
        (state.rip, state.gpr[0], state.gpr[1], state.gpr[2]) = (CODE, 0, first, last);
        (state.gpr[6], state.gpr[7]) = (SCATTERED + 0x20, SCATTERED);
        assert_eq!(machine.run_to_halt().gpr[0], sum, "{first:x} to {last:x}");
    }
}
