//! String instructions: what is done inline, what in Rust, and where a host page is missing.

#![expect(
    unsafe_code,
    reason = "takes a page of guest RAM away, and gives it back"
)]

mod machine;

use cpu::Exit;
use machine::{CODE, DATA, Machine};

/// The element's size and the bytes of the moving and of the filling instruction.
const FORMS: [(u64, &[u8], &[u8]); 4] = [
    (1, &[0xf3, 0xa4], &[0xf3, 0xaa]),
    (2, &[0xf3, 0x66, 0xa5], &[0xf3, 0x66, 0xab]),
    (4, &[0xf3, 0xa5], &[0xf3, 0xab]),
    (8, &[0xf3, 0x48, 0xa5], &[0xf3, 0x48, 0xab]),
];
const SPACE: usize = 4 * 4096;
const RAX: u64 = 0x8877_6655_4433_2211;

/// Offsets from [`DATA`] and a count.
#[derive(Clone, Copy, Debug)]
struct Case {
    from: u64,
    to: u64,
    count: u64,
    down: bool,
}

fn bytes_of(step: usize) -> Vec<u8> {
    (0..SPACE).map(|i| ((i * step) >> 3) as u8).collect()
}

/// The string instruction between two that keep the carry: flags are live across it.
fn program(body: &[u8], down: bool) -> Vec<u8> {
    let mut code = vec![if down { 0xfd } else { 0xfc }, 0xf9];
    code.extend(body);
    // setc bl; hlt
    code.extend([0x0f, 0x92, 0xc3, 0xf4]);
    code
}

/// What the instruction does, element by element.
fn model(memory: &mut [u8], case: Case, size: u64, moves: bool) -> (u64, u64) {
    let (mut from, mut to) = (case.from, case.to);
    let step = if case.down { size.wrapping_neg() } else { size };
    for _ in 0..case.count {
        let mut element = RAX.to_le_bytes();
        if moves {
            element[..size as usize].copy_from_slice(&memory[from as usize..][..size as usize]);
        }
        memory[to as usize..][..size as usize].copy_from_slice(&element[..size as usize]);
        from = from.wrapping_add(step);
        to = to.wrapping_add(step);
    }
    (if moves { from } else { case.from }, to)
}

fn check(machine: &mut Machine, case: Case, size: u64, moves: bool) {
    let mut expected = bytes_of(37);
    machine.write(DATA, &expected);
    let (from, to) = model(&mut expected, case, size, moves);
    let state = machine.vcpu.state_mut();
    state.rip = CODE;
    state.rflags = 2;
    state.gpr[0] = RAX;
    state.gpr[1] = case.count;
    state.gpr[3] = 0;
    state.gpr[6] = DATA + case.from;
    state.gpr[7] = DATA + case.to;
    let gpr = machine.run_to_halt().gpr;
    let mut found = vec![0; SPACE];
    machine.read(DATA, &mut found);
    assert_eq!(found, expected, "{case:x?}, elements of {size}");
    assert_eq!(
        [gpr[0], gpr[1], gpr[3], gpr[6], gpr[7]],
        [RAX, 0, 1, DATA.wrapping_add(from), DATA.wrapping_add(to)],
        "{case:x?}, elements of {size}"
    );
}

#[test]
fn repetitions_of_all_sizes_and_places() {
    let counts = [0, 1, 3, 64, 511, 512, 513, 1024];
    let places = [
        (0x100, 0x1200),
        (0x1ff8, 0x801),
        (0x900, 0x901),
        (0x1003, 0x1000),
    ];
    for (size, moving, filling) in FORMS {
        for (body, moves) in [(moving, true), (filling, false)] {
            for down in [false, true] {
                let mut machine = Machine::new(&program(body, down));
                for count in counts {
                    for (from, to) in places {
                        let shift = if down { count * size } else { 0 };
                        let (from, to) = (from + shift, to + shift);
                        let case = Case {
                            from,
                            to,
                            count,
                            down,
                        };
                        if from.max(to) + (count + 1) * size <= SPACE as u64 {
                            check(&mut machine, case, size, moves);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn one_element_each() {
    // lodsb; stosw; movsq; hlt
    let mut machine = Machine::new(&[0xac, 0x66, 0xab, 0x48, 0xa5, 0xf4]);
    machine.write(DATA, &bytes_of(11));
    for _ in 0..2 {
        let state = machine.vcpu.state_mut();
        state.rip = CODE;
        state.gpr[0] = 0x1234_5678;
        state.gpr[6] = DATA + 0xfff;
        state.gpr[7] = DATA + 0x2ffe;
        let gpr = machine.run_to_halt().gpr;
        let bytes = bytes_of(11);
        assert_eq!(gpr[0], 0x1234_5600 | u64::from(bytes[0xfff]));
        assert_eq!((gpr[6], gpr[7]), (DATA + 0x1008, DATA + 0x3008));
        let mut found = [0; 10];
        machine.read(DATA + 0x2ffe, &mut found);
        assert_eq!((found[0], found[1]), (bytes[0xfff], 0x56));
        assert_eq!(found[2..], bytes[0x1000..0x1008]);
    }
}

/// A count whose product with the size wraps must not be taken for a short one.
#[test]
fn a_count_that_wraps() {
    let mut machine = Machine::new(&program(&[0xf3, 0x48, 0xab], false));
    for count in [1 << 61, 1 << 63, u64::MAX] {
        let state = machine.vcpu.state_mut();
        state.rip = CODE;
        state.gpr[1] = count;
        state.gpr[7] = machine::RAM_BYTES - 0x800;
        let exit = machine.run();
        assert!(matches!(exit, Exit::Mmio(_)), "{exit:?}");
        let state = machine.vcpu.state();
        assert_eq!(state.gpr[1], count - 0x101);
    }
}

fn protect(machine: &Machine, offset: u64, protection: i32) {
    let page = machine.host(offset).raw() as *mut libc::c_void;
    // SAFETY: a page of this machine's RAM, to which no reference exists.
    let result = unsafe { libc::mprotect(page, 4096, protection) };
    assert_eq!(result, 0);
}

#[test]
fn a_page_that_the_host_has_not() {
    for (body, missing) in [
        (FORMS[3].1, 0x2000),
        (FORMS[3].1, 0x0000),
        (FORMS[3].2, 0x2000),
    ] {
        let mut machine = Machine::new(&program(body, false));
        let mut case = |expected: &Exit, gone: bool| {
            let protection = if gone {
                libc::PROT_NONE
            } else {
                libc::PROT_READ | libc::PROT_WRITE
            };
            protect(&machine, DATA + missing, protection);
            let state = machine.vcpu.state_mut();
            state.rip = CODE + 2;
            state.gpr[1] = 16;
            state.gpr[6] = DATA + 0x10;
            state.gpr[7] = DATA + 0x2020;
            let exit = machine.run();
            let same = std::mem::discriminant(&exit) == std::mem::discriminant(expected);
            assert!(same, "{exit:?}");
            machine.vcpu.state().clone()
        };
        let _ = case(&Exit::Halt, false);
        let fault = Exit::HostFault(cpu::HostFault {
            gpa: None,
            hva: addr::Hva::new(0),
        });
        let state = case(&fault, true);
        assert_eq!(state.rip, CODE + 2);
        assert_eq!(
            (state.gpr[1], state.gpr[6], state.gpr[7]),
            (16, DATA + 0x10, DATA + 0x2020)
        );
        let state = case(&Exit::Halt, false);
        assert_eq!((state.gpr[1], state.gpr[7]), (0, DATA + 0x20a0));
    }
}
