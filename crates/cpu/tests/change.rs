//! Code that changes under the CPU, several CPUs on one memory, and kicks.

mod machine;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cpu::Exit;
use machine::{Bare, CODE, DATA, Machine, STACK, long_mode};
use memory::quiesce::Requests;
use mmu::{MmuConfig, PagingPath};

/// `mov eax, imm32; hlt`
const ANSWER: [u8; 6] = [0xb8, 1, 0, 0, 0, 0xf4];

#[test]
fn code_that_writes_itself() {
    // mov byte [rip+1], 7 ; the next instruction's immediate
    // mov eax, 1; hlt
    let mut code = vec![0xc6, 0x05, 1, 0, 0, 0, 7];
    code.extend(ANSWER);
    let mut machine = Machine::new(&code);
    assert_eq!(machine.run_to_halt().gpr[0], 7);
}

#[test]
fn code_that_is_written_behind_a_chain() {
    // call f; mov byte [f+1], 9; call f; hlt; f: mov eax, 1; ret
    let code = [
        0xe8, 0x0d, 0, 0, 0, // call f
        0xc6, 0x05, 0x07, 0, 0, 0, 9, // mov byte [rip+7], 9
        0xe8, 0x01, 0, 0, 0,    // call f
        0xf4, // hlt
        0xb8, 1, 0, 0, 0, 0xc3, // f
    ];
    let mut machine = Machine::new(&code);
    assert_eq!(machine.run_to_halt().gpr[0], 9);
}

/// Two blocks whose addresses share a slot of the table of indirect jumps.
#[test]
fn flags_pass_the_block_that_is_not_meant() {
    // stc; jmp rax
    let mut machine = Machine::new(&[0xf9, 0xff, 0xe0]);
    // xor ebx, ebx; hlt
    let first = CODE + 0x1000;
    machine.write(first, &[0x31, 0xdb, 0xf4]);
    // setc bl; hlt
    let second = CODE + 0x3000;
    machine.write(second, &[0x0f, 0x92, 0xc3, 0xf4]);
    for (target, answer) in [
        (first, 0),
        (second, 1),
        (second, 1),
        (first, 0),
        (second, 1),
    ] {
        let state = machine.vcpu.state_mut();
        state.rip = CODE;
        state.gpr[0] = target;
        state.gpr[3] = 0;
        assert_eq!(machine.run_to_halt().gpr[3], answer);
    }
}

#[test]
fn code_that_the_host_writes() {
    let mut machine = Machine::new(&ANSWER);
    assert_eq!(machine.run_to_halt().gpr[0], 1);
    for value in 2..20 {
        machine.write(CODE + 1, &[value]);
        machine.vcpu.state_mut().rip = CODE;
        assert_eq!(machine.run_to_halt().gpr[0], u64::from(value));
    }
}

#[test]
fn a_remapped_page_brings_other_code() {
    let mut machine = Machine::new(&ANSWER);
    assert_eq!(machine.run_to_halt().gpr[0], 1);
    machine.write(CODE + 0x80_0000, &[0xb8, 5, 0, 0, 0, 0xf4]);
    machine.write_word(0x3000, 0x80_0087);
    let state = machine.vcpu.state_mut();
    state.rip = CODE;
    assert_eq!(machine.run_to_halt().gpr[0], 5);
}

#[test]
fn a_kick_ends_an_endless_loop() {
    // jmp self
    let mut machine = Machine::new(&[0xeb, 0xfe]);
    let kicker = machine.vcpu.kicker();
    for _ in 0..20 {
        let kicker = kicker.clone();
        let kick = thread::spawn(move || {
            thread::sleep(Duration::from_millis(2));
            kicker.request(Requests::EXIT);
        });
        let started = Instant::now();
        assert_eq!(machine.run(), Exit::Interrupted);
        assert!(started.elapsed() < Duration::from_secs(5));
        kick.join().unwrap();
    }
}

#[test]
fn locked_increments_of_two_cpus() {
    // mov ecx, 100000; l: lock inc qword [DATA]; dec ecx; jnz l; hlt
    const ROUNDS: u64 = 100_000;
    let code = [
        0xb9, 0xa0, 0x86, 0x01, 0x00, //
        0xf0, 0x48, 0xff, 0x04, 0x25, 0, 0, 0x20, 0, //
        0xff, 0xc9, //
        0x75, 0xf3, //
        0xf4,
    ];
    let mut machine = Machine::new(&code);
    let mut other = Machine::vcpu(&machine.mmu, &machine.domain, &machine.code, 1);
    long_mode(other.state_mut());
    other.state_mut().gpr[4] = STACK + 0x1000;
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(other.run(&mut Bare::default()), Exit::Halt));
        machine.run_to_halt();
    });
    assert_eq!(machine.word(DATA), 2 * ROUNDS);
}

#[test]
fn code_patched_by_another_cpu() {
    // First: l: mov eax, 1; cmp eax, 1; je l; hlt. Second: writes the 2 into the immediate.
    let code = [
        0xb8, 1, 0, 0, 0, //
        0x83, 0xf8, 0x01, //
        0x74, 0xf6, //
        0xf4,
    ];
    // mov byte [CODE+1], 2; hlt
    let patch = [0xc6, 0x04, 0x25, 0x01, 0x00, 0x10, 0x00, 0x02, 0xf4];
    let mut machine = Machine::new(&code);
    machine.write(CODE + 0x8000, &patch);
    let mut other = Machine::vcpu(&machine.mmu, &machine.domain, &machine.code, 1);
    long_mode(other.state_mut());
    other.state_mut().rip = CODE + 0x8000;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watchdog = machine.vcpu.kicker();
        let done = &done;
        scope.spawn(move || {
            let started = Instant::now();
            while !done.load(Ordering::Relaxed) && started.elapsed() < Duration::from_secs(20) {
                thread::sleep(Duration::from_millis(5));
            }
            watchdog.request(Requests::EXIT);
        });
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            assert_eq!(other.run(&mut Bare::default()), Exit::Halt);
        });
        let exit = machine.run();
        done.store(true, Ordering::Relaxed);
        assert_eq!(exit, Exit::Halt);
    });
    assert_eq!(machine.vcpu.state().gpr[0], 2);
}

#[test]
fn a_stack_frame_across_a_page() {
    // Pushes and pops that share a check, with the stack pointer 16 bytes above a page's start.
    // mov rax, 1; push rax; push rax; inc rax; push rax; push rax; pop rbx; pop rcx; pop rdx; pop rsi; hlt
    let code = [
        0x48, 0xc7, 0xc0, 1, 0, 0, 0, 0x50, 0x50, 0x48, 0xff, 0xc0, 0x50, 0x50, //
        0x5b, 0x59, 0x5a, 0x5e, 0xf4,
    ];
    for offset in [0, 8, 16, 24, 32] {
        let mut machine = Machine::new(&code);
        machine.vcpu.state_mut().gpr[4] = STACK + offset;
        let state = machine.run_to_halt();
        let popped = [state.gpr[3], state.gpr[1], state.gpr[2], state.gpr[6]];
        assert_eq!(popped, [2, 2, 1, 1], "at {offset}");
        assert_eq!(state.gpr[4], STACK + offset);
    }
}

/// A guest takes table after table into use and never flushes: its shadow pages stay few, and loads
/// across two tables find what they should.
#[test]
fn shadow_pages_are_few_while_the_guest_runs() {
    const ROUNDS: u64 = 200;
    const FIRST: u64 = 8;
    const LIMIT: usize = 64;
    // again: add rax, [rbx]; add rbx, 0x200000; dec ecx; jnz again; hlt
    let code = [
        0x48, 0x03, 0x03, 0x48, 0x81, 0xc3, 0, 0, 0x20, 0, 0xff, 0xc9, 0x75, 0xf2, 0xf4,
    ];
    let config = MmuConfig {
        path: PagingPath::Shadow,
        shadow_pages: LIMIT,
        ..MmuConfig::default()
    };
    let mut machine = Machine::with_mmu(&code, config);
    // Each table maps its last page and its first one; a load takes half of each of two tables.
    for i in 0..=ROUNDS {
        let (table, last, first) = (
            0x40_0000 + i * 0x1000,
            0x80_0000 + i * 0x2000,
            0x80_1000 + i * 0x2000,
        );
        machine.write_word(0x3000 + 8 * (FIRST + i), table | 7);
        machine.write_word(table + 8 * 511, last | 7);
        machine.write_word(table, first | 7);
        machine.write(last + 0xffc, &(i as u32 + 1).to_le_bytes());
        machine.write(first, &(3 * i as u32).to_le_bytes());
    }
    let state = machine.vcpu.state_mut();
    (state.gpr[0], state.gpr[1], state.gpr[3]) = (0, ROUNDS, ((FIRST + 1) << 21) - 4);
    let sum: u64 = (0..ROUNDS).map(|i| (i + 1) + ((3 * (i + 1)) << 32)).sum();
    assert_eq!(machine.run_to_halt().gpr[0], sum);
    assert!(machine.mmu.stats().mmu_recycled.get() > LIMIT as u64);
    assert!(machine.mmu.table_bytes() <= (LIMIT + 16) * 2 * 4096);
}
