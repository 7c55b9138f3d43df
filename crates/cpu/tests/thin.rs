//! The thinnest line through the CPU: a handful of instructions in long mode.

mod machine;

use cpu::{Exit, MmioExit};
use machine::{CODE, DATA, Machine, STACK};

#[test]
fn ten_instructions() {
    // mov rbx, DATA; mov rcx, 5; xor eax, eax
    // loop: add rax, rcx; mov [rbx+rcx*8], rax; dec rcx; jnz loop
    // push rax; pop r9; call f; hlt; f: mov r10, [rbx+8]; ret
    let code = [
        0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00, //
        0x48, 0xc7, 0xc1, 0x05, 0x00, 0x00, 0x00, //
        0x31, 0xc0, //
        0x48, 0x01, 0xc8, //
        0x48, 0x89, 0x04, 0xcb, //
        0x48, 0xff, 0xc9, //
        0x75, 0xf4, //
        0x50, //
        0x41, 0x59, //
        0xe8, 0x01, 0x00, 0x00, 0x00, //
        0xf4, //
        0x4c, 0x8b, 0x53, 0x08, //
        0xc3,
    ];
    let mut machine = Machine::new(&code);
    let state = machine.run_to_halt().clone();
    assert_eq!(state.gpr[0], 15);
    assert_eq!(state.gpr[9], 15);
    assert_eq!(state.gpr[10], 15);
    assert_eq!(state.gpr[4], STACK);
    assert_eq!(machine.word(DATA + 8), 15);
    assert_eq!(machine.word(DATA + 40), 5);
    assert_eq!(machine.word(STACK - 8), CODE + 36);
}

#[test]
fn device_memory() {
    // mov eax, [0x20000000]; add [0x20000008], eax; hlt
    let code = [
        0x8b, 0x04, 0x25, 0x00, 0x00, 0x00, 0x20, //
        0x01, 0x04, 0x25, 0x08, 0x00, 0x00, 0x20, //
        0xf4,
    ];
    let mut machine = Machine::new(&code);
    let read = |at| {
        Exit::Mmio(MmioExit {
            gpa: addr::Gpa::new(at),
            len: 4,
            write: None,
        })
    };
    assert_eq!(machine.run(), read(0x2000_0000));
    machine.vcpu.complete_mmio(&7u32.to_le_bytes());
    assert_eq!(machine.run(), read(0x2000_0008));
    machine.vcpu.complete_mmio(&3u32.to_le_bytes());
    assert_eq!(
        machine.run(),
        Exit::Mmio(MmioExit {
            gpa: addr::Gpa::new(0x2000_0008),
            len: 4,
            write: Some([10, 0, 0, 0, 0, 0, 0, 0]),
        })
    );
    machine.run_to_halt();
}

#[test]
fn operand_across_a_page() {
    // mov rax, [DATA+0xffc]; add [DATA+0xffc], rax; hlt
    let code = [
        0x48, 0x8b, 0x04, 0x25, 0xfc, 0x0f, 0x20, 0x00, //
        0x48, 0x01, 0x04, 0x25, 0xfc, 0x0f, 0x20, 0x00, //
        0xf4,
    ];
    let mut machine = Machine::new(&code);
    machine.write_word(DATA + 0xffc, 0x1122_3344_5566_7788);
    assert_eq!(machine.run_to_halt().gpr[0], 0x1122_3344_5566_7788);
    assert_eq!(machine.word(DATA + 0xffc), 0x2244_6688_aacc_ef10);
}
