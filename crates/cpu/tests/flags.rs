//! The arithmetic flags that a fault or an interrupt finds, where the code never reads them.

mod machine;

use std::thread;
use std::time::Duration;

use cpu::system::GuestDebug;
use cpu::{CpuState, Exit};
use machine::{CODE, DATA, Machine, RAM_BYTES};
use memory::quiesce::Requests;
use x86::rflags;

/// Steps that no code below takes.
const STEPS: usize = 1_000_000;

/// Interrupts of a loop.
const KICKS: u32 = 60;

/// Code that comes to a device, beyond the end of RAM, by rdi or rsi.
const CODES: [(&str, &[u8]); 20] = [
    // cmp %rbx,%rax; mov (%rdi),%rcx; xor %eax,%eax; hlt
    (
        "the operands are left",
        &[0x48, 0x39, 0xd8, 0x48, 0x8b, 0x0f, 0x31, 0xc0, 0xf4],
    ),
    // cmp %rbx,%rax; mov %rdi,%rax; mov (%rax),%rcx; xor %eax,%eax; hlt
    (
        "an operand is replaced",
        &[
            0x48, 0x39, 0xd8, 0x48, 0x89, 0xf8, 0x48, 0x8b, 0x08, 0x31, 0xc0, 0xf4,
        ],
    ),
    // cmp (%rsi),%eax; mov (%rsi),%ecx; mov (%rsi),%ebx; mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "put aside",
        &[
            0x3b, 0x06, 0x8b, 0x0e, 0x8b, 0x1e, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // stc; mov (%rsi),%ecx; inc %eax; mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "some are replaced before",
        &[0xf9, 0x8b, 0x0e, 0xff, 0xc0, 0x8b, 0x0f, 0x31, 0xc0, 0xf4],
    ),
    // cmp %ebx,%eax; jne 1f; mov (%rsi),%ecx; 1: mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "two ways meet",
        &[
            0x39, 0xd8, 0x75, 0x02, 0x8b, 0x0e, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // 1: add (%rdi),%rax; add $8,%rdi; cmp %rbp,%rdi; jne 1b; hlt
    (
        "sum",
        &[
            0x48, 0x03, 0x07, 0x48, 0x83, 0xc7, 0x08, 0x48, 0x39, 0xef, 0x75, 0xf4, 0xf4,
        ],
    ),
    // 1: mov (%rsi),%al; mov %al,(%rdi); inc %rsi; inc %rdi; dec %rdx; jne 1b; hlt
    (
        "copy that leaves the carry alone",
        &[
            0x8a, 0x06, 0x88, 0x07, 0x48, 0xff, 0xc6, 0x48, 0xff, 0xc7, 0x48, 0xff, 0xca, 0x75,
            0xf1, 0xf4,
        ],
    ),
    // 1: inc %rdi; cmpb $1,-1(%rdi); jne 1b; hlt
    (
        "length",
        &[0x48, 0xff, 0xc7, 0x80, 0x7f, 0xff, 0x01, 0x75, 0xf7, 0xf4],
    ),
    // 1: add $1,%rdi; cmpb $1,-1(%rdi); jne 1b; hlt
    (
        "length by addition",
        &[
            0x48, 0x83, 0xc7, 0x01, 0x80, 0x7f, 0xff, 0x01, 0x75, 0xf6, 0xf4,
        ],
    ),
    // 1: mov (%rsi),%eax; imul %ebx,%eax; mov %eax,(%rdi); add $4,%rsi; add $4,%rdi; dec %edx; jne 1b; hlt
    (
        "product between",
        &[
            0x8b, 0x06, 0x0f, 0xaf, 0xc3, 0x89, 0x07, 0x48, 0x83, 0xc6, 0x04, 0x48, 0x83, 0xc7,
            0x04, 0xff, 0xca, 0x75, 0xed, 0xf4,
        ],
    ),
    // 1: mov (%rdi),%al; shl $3,%ecx; mov %al,1(%rdi); add $3,%rdi; cmpb $1,-2(%rdi); jne 1b; hlt
    (
        "shift between",
        &[
            0x8a, 0x07, 0xc1, 0xe1, 0x03, 0x88, 0x47, 0x01, 0x48, 0x83, 0xc7, 0x03, 0x80, 0x7f,
            0xfe, 0x01, 0x75, 0xee, 0xf4,
        ],
    ),
    // 1: add (%rdi),%al; inc %rdi; dec %rdx; jne 1b; hlt
    (
        "bytes with their carry",
        &[
            0x02, 0x07, 0x48, 0xff, 0xc7, 0x48, 0xff, 0xca, 0x75, 0xf6, 0xf4,
        ],
    ),
    // 1: mov (%rdi),%rax; lea 64(%rdi),%rdi; sub $1,%rdx; jne 1b; hlt
    (
        "long steps",
        &[
            0x48, 0x8b, 0x07, 0x48, 0x8d, 0x7f, 0x40, 0x48, 0x83, 0xea, 0x01, 0x75, 0xf3, 0xf4,
        ],
    ),
    // 1: movq (%rsi),%xmm0; movq %xmm0,(%rdi); add $8,%rsi; add $8,%rdi; sub $8,%rdx; ja 1b; hlt
    (
        "vectors",
        &[
            0xf3, 0x0f, 0x7e, 0x06, 0x66, 0x0f, 0xd6, 0x07, 0x48, 0x83, 0xc6, 0x08, 0x48, 0x83,
            0xc7, 0x08, 0x48, 0x83, 0xea, 0x08, 0x77, 0xea, 0xf4,
        ],
    ),
    // 1: incl (%rdi); mov (%rsi),%eax; add $4,%rsi; add $4,%rdi; cmp %rdi,%rbp; ja 1b; hlt
    (
        "an increment in memory",
        &[
            0xff, 0x07, 0x8b, 0x06, 0x48, 0x83, 0xc6, 0x04, 0x48, 0x83, 0xc7, 0x04, 0x48, 0x39,
            0xfd, 0x77, 0xef, 0xf4,
        ],
    ),
    // cmp %rbx,%rax; mov (%rsi),%rax; mov (%rdi),%rcx; xor %eax,%eax; hlt
    (
        "an operand is replaced between",
        &[
            0x48, 0x39, 0xd8, 0x48, 0x8b, 0x06, 0x48, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // cmp %ebx,%eax; mov (%rsi),%ecx; inc %edx; mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "some are replaced behind a comparison",
        &[
            0x39, 0xd8, 0x8b, 0x0e, 0xff, 0xc2, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // cmp %ebx,%eax; mov (%rsi),%ecx; shl $3,%edx; mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "a shift behind a comparison",
        &[
            0x39, 0xd8, 0x8b, 0x0e, 0xc1, 0xe2, 0x03, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // test %ebx,%eax; jne 1f; mov (%rsi),%eax; cmp %ecx,%eax; mov %rsi,%rsi; mov (%rsi),%eax;
    // mov (%rsi),%edx; 1: mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "two ways meet with other flags",
        &[
            0x85, 0xd8, 0x75, 0x0b, 0x8b, 0x06, 0x39, 0xc8, 0x48, 0x89, 0xf6, 0x8b, 0x06, 0x8b,
            0x16, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
    // test %ebx,%eax; jne 1f; mov (%rsi),%edx; cmp %ecx,%esi; 1: mov (%rdi),%ecx; xor %eax,%eax; hlt
    (
        "a comparison on one of two ways",
        &[
            0x85, 0xd8, 0x75, 0x04, 0x8b, 0x16, 0x39, 0xce, 0x8b, 0x0f, 0x31, 0xc0, 0xf4,
        ],
    ),
];

/// Where rdi and rsi begin: so many bytes in front of the device, or in RAM.
fn starts() -> impl Iterator<Item = (u64, u64)> {
    let far = [0, 1, 5, 16, 67, 4099];
    let both = far.map(|distance| [(RAM_BYTES - distance, DATA), (DATA, RAM_BYTES - distance)]);
    both.into_iter().flatten()
}

fn begin(machine: &mut Machine, at: (u64, u64), rbx: u64) {
    machine.write(DATA, &vec![0; 0x5000]);
    machine.write(DATA + 0x1100, &[1; 16]);
    machine.write(RAM_BYTES - 0x2000, &[0; 0x2000]);
    let state = machine.vcpu.state_mut();
    state.rip = CODE;
    state.rflags = rflags::FIXED | rflags::AF | rflags::PF;
    state.gpr = [0; 16];
    (state.gpr[0], state.gpr[3], state.gpr[1]) = (0x7fff_fff0, rbx, 0x1234_5678);
    (state.gpr[7], state.gpr[6]) = at;
    (state.gpr[2], state.gpr[5]) = (0x1101, at.0 + 0x4000);
    machine.vcpu.set_guest_debug(GuestDebug::default());
}

/// Lets it come to the device by single steps.
fn by_steps(machine: &mut Machine) -> Exit {
    let debug = GuestDebug {
        enabled: true,
        single_step: true,
        ..GuestDebug::default()
    };
    machine.vcpu.set_guest_debug(debug);
    let mut exits = (0..STEPS).map(|_| machine.run());
    let end = exits.find(|exit| !matches!(exit, Exit::Debug(_)));
    end.expect("an end")
}

fn registers(state: &CpuState) -> (u64, u64, [u64; 16]) {
    (state.rip, state.rflags, state.gpr)
}

#[test]
fn a_device_is_come_to_with_the_flags_of_single_steps() {
    for (name, code) in CODES {
        let mut machine = Machine::new(code);
        let mut devices = 0;
        for at in starts() {
            for rbx in [0x7fff_fff0, 3] {
                begin(&mut machine, at, rbx);
                let exit = by_steps(&mut machine);
                let expected = registers(machine.vcpu.state());
                begin(&mut machine, at, rbx);
                assert_eq!(machine.run(), exit, "{name}, from {at:x?}");
                let found = registers(machine.vcpu.state());
                assert_eq!(found, expected, "{name}, from {at:x?}, {rbx:x}");
                devices += u32::from(matches!(exit, Exit::Mmio(_)));
            }
        }
        assert!(devices > 4, "{name}: only {devices} came to the device");
    }
}

/// What the flags must be at an instruction of a loop, given the registers there.
type Expected = fn(&[u64; 16]) -> u64;

/// The loop for ever; who interrupts it finds the flags of the instruction in front.
fn interrupted(code: &[u8], data: &[u8], expected: &[(u64, Expected)]) {
    let mut machine = Machine::new(code);
    let mut seen = vec![0; expected.len()];
    begin(&mut machine, (DATA, DATA), 0x40);
    machine.write(DATA, data);
    for _ in 0..KICKS {
        let kicker = machine.vcpu.kicker();
        let kicking = thread::spawn(move || {
            thread::sleep(Duration::from_micros(700));
            kicker.request(Requests::EXIT);
        });
        assert_eq!(machine.run(), Exit::Interrupted);
        kicking.join().expect("it only kicks");
        let state = machine.vcpu.state();
        if (state.rip, state.gpr[7]) == (CODE, DATA) {
            // It has not run at all yet.
            continue;
        }
        let at = expected
            .iter()
            .position(|(offset, _)| CODE + offset == state.rip);
        if let Some(at) = at {
            let flags = state.rflags & rflags::ARITHMETIC;
            assert_eq!(flags, expected[at].1(&state.gpr), "at {:#x}", state.rip);
            seen[at] += 1;
        }
    }
    assert!(seen.iter().sum::<u32>() > KICKS / 3, "{seen:?}");
}

#[test]
fn an_interrupt_finds_the_flags_of_a_sum() {
    // 2: mov %rsi,%rdi; lea 0x8000(%rdi),%rdx
    // 1: add (%rdi),%rax; add $8,%rdi; cmp %rdx,%rdi; jne 1b; jmp 2b
    let code = [
        0x48, 0x89, 0xf7, 0x48, 0x8d, 0x97, 0x00, 0x80, 0x00, 0x00, 0x48, 0x03, 0x07, 0x48, 0x83,
        0xc7, 0x08, 0x48, 0x39, 0xd7, 0x75, 0xf4, 0xeb, 0xe8,
    ];
    let compared: Expected = |gpr| rflags::of_difference(gpr[7], gpr[2], 64);
    let added: Expected = |gpr| rflags::of_sum(gpr[7].wrapping_sub(8), 8, 64);
    interrupted(
        &code,
        &[],
        &[(10, compared), (17, added), (0, compared), (22, compared)],
    );
}

#[test]
fn an_interrupt_finds_the_flags_of_a_search() {
    // 2: mov %rsi,%rdi; 1: inc %rdi; cmpb $1,(%rdi); jne 1b; jmp 2b, where a 1 ends many bytes of 9
    let code = [
        0x48, 0x89, 0xf7, 0x48, 0xff, 0xc7, 0x80, 0x3f, 0x01, 0x75, 0xf8, 0xeb, 0xf3,
    ];
    let nine: Expected = |_| rflags::of_difference(9, 1, 8);
    let one: Expected = |_| rflags::of_difference(1, 1, 8);
    let mut bytes = vec![9; 0x8000];
    bytes.push(1);
    interrupted(&code, &bytes, &[(3, nine), (0, one), (11, one)]);
}

/// A span that crosses a page goes on in another translation, from the second time on without leaving.
#[test]
fn a_span_across_a_page_brings_flags_along() {
    let writers: [&[u8]; 10] = [
        &[0x48, 0x39, 0xd8],             // cmp %rbx,%rax
        &[0x3c, 0x81],                   // cmp $0x81,%al
        &[0x85, 0xd8],                   // test %ebx,%eax
        &[0x66, 0x21, 0xd8],             // and %bx,%ax
        &[0x48, 0x29, 0xd8],             // sub %rbx,%rax
        &[0x2d, 0x00, 0x00, 0x00, 0x80], // sub $0x80000000,%eax
        &[0x00, 0xd8],                   // add %bl,%al
        &[0x4d, 0x01, 0xd9],             // add %r11,%r9
        &[0xf7, 0xd8],                   // neg %eax
        &[0xd1, 0xe0],                   // shl %eax
    ];
    // mov (%rsi),%ecx; mov 4(%rsi),%edx; mov (%rdi),%ecx; xor %eax,%eax; hlt
    let rest = [0x8b, 0x0e, 0x8b, 0x56, 0x04, 0x8b, 0x0f, 0x31, 0xc0, 0xf4];
    for writer in writers {
        let mut machine = Machine::new(&[writer, &rest].concat());
        for rbx in [0x7fff_fff0, 0x8000_0001, 3] {
            let at = (RAM_BYTES, DATA + 0xffc);
            begin(&mut machine, at, rbx);
            let exit = by_steps(&mut machine);
            let expected = registers(machine.vcpu.state());
            for _ in 0..3 {
                begin(&mut machine, at, rbx);
                assert_eq!(machine.run(), exit, "{writer:x?}");
                let found = registers(machine.vcpu.state());
                assert_eq!(found, expected, "{writer:x?}, {rbx:x}");
            }
        }
    }
}
