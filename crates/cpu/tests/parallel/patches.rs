//! Code that another vCPU patches, again and again (SDM 3A, 10.1.3).

use super::threads::{Program, machine, run};
use crate::machine::{CODE, DATA};

const ROUNDS: u64 = 1500;
const FLAG: u64 = DATA;
const ANSWER: u64 = DATA + 64;
/// `mov $imm32,%eax; ret`
const FUNCTION: u64 = CODE + 0x8_0000;

/// One vCPU writes the next number into the function and says so; the other serialises, calls it, and
/// answers.
#[test]
fn a_function_patched_while_another_waits_for_it() {
    let (machine, mut vcpus) = machine(2);
    machine.write(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let patcher = [
        0xff, 0xc2, // next: inc %edx
        0x89, 0x57, 0x01, // mov %edx,1(%rdi)
        0x89, 0x16, // mov %edx,(%rsi)
        0x39, 0x56, 0x40, // wait: cmp %edx,64(%rsi)
        0x75, 0xfb, // jne wait
        0xff, 0xc9, // dec %ecx
        0x75, 0xf0, // jne next
        0xf4,
    ];
    let caller = [
        0x41, 0xff, 0xc0, // next: inc %r8d
        0x44, 0x39, 0x06, // wait: cmp %r8d,(%rsi)
        0x75, 0xfb, // jne wait
        0x31, 0xc0, // xor %eax,%eax
        0x0f, 0xa2, // cpuid
        0xff, 0xd7, // call *%rdi
        0x44, 0x39, 0xc0, // cmp %r8d,%eax
        0x75, 0x09, // jne wrong
        0x44, 0x89, 0x46, 0x40, // mov %r8d,64(%rsi)
        0x41, 0xff, 0xc9, // dec %r9d
        0x75, 0xe4, // jne next
        0xf4, // wrong: hlt
    ];
    let registers = [(6, FLAG), (7, FUNCTION), (1, ROUNDS), (9, ROUNDS)];
    let programs = [&patcher[..], &caller].map(|code| Program {
        code,
        registers: &registers,
    });
    run(&machine, &mut vcpus, &programs);
    assert_eq!(vcpus[1].state().gpr[9], 0, "an old instruction ran");
    assert_eq!(machine.word(ANSWER), ROUNDS);
}
