//! RF, which every handler of a fault returns with: seen where it counts, and by nobody else.

mod machine;

use cpu::{CpuState, Exit};
use machine::{CODE, DATA, Machine, STACK};
use x86::rflags;
use x86::vector;

const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const CS: u64 = 0x10;
const SS: u64 = 0x18;
/// Where `IRETQ` goes to.
const TARGET: u64 = CODE + 0x100;
const HANDLER: u64 = CODE + 0x200;
/// `mov rax, [rsp + 16]; hlt`: the flags of a frame without an error code.
const TELL_FLAGS: &[u8] = &[0x48, 0x8b, 0x44, 0x24, 0x10, 0xf4];
const IRETQ: &[u8] = &[0x48, 0xcf];

/// A machine at an `IRETQ` with these flags to `target`.
fn returning(flags: u64, target: &[u8]) -> Machine {
    let mut machine = Machine::new(IRETQ);
    machine.write(TARGET, target);
    machine.write_word(GDT + CS, 0x00af_9b00_0000_ffff);
    machine.write_word(GDT + SS, 0x00cf_9300_0000_ffff);
    let frame = [TARGET, CS, flags, STACK - 0x100, SS];
    for (at, value) in (0..).zip(frame) {
        machine.write_word(STACK - 0x80 + 8 * at, value);
    }
    let state = machine.vcpu.state_mut();
    state.gpr[4] = STACK - 0x80;
    (state.gdtr.base, state.gdtr.limit) = (GDT, 0x1f);
    (state.idtr.base, state.idtr.limit) = (IDT, 0xfff);
    machine
}

fn handle(machine: &Machine, vector: u8, code: &[u8]) {
    let gate = IDT + 16 * u64::from(vector);
    machine.write(HANDLER, code);
    let low = HANDLER & 0xffff | CS << 16 | 0x8e00 << 32 | HANDLER >> 16 << 48;
    machine.write_word(gate, low);
    machine.write_word(gate + 8, 0);
}

/// RAX where it halts.
fn result(machine: &mut Machine) -> u64 {
    let state: &CpuState = machine.run_to_halt();
    assert_eq!(state.rflags & rflags::RF, 0);
    state.gpr[0]
}

const WITH_RF: u64 = rflags::FIXED | rflags::RF;

#[test]
fn an_event_before_the_instruction_finds_it() {
    for flags in [WITH_RF, rflags::FIXED] {
        // nop; hlt
        let mut machine = returning(flags, &[0x90, 0xf4]);
        handle(&machine, vector::NMI, TELL_FLAGS);
        // IRETQ ends the one, and the other comes.
        let events = &mut machine.vcpu.state_mut().events;
        (events.nmi_masked, events.nmi_pending) = (true, 1);
        assert_eq!(result(&mut machine), flags);
        assert_eq!(machine.word(STACK - 0x100 - 40), TARGET);
    }
}

#[test]
fn an_instruction_that_leaves_has_it_until_it_is_over() {
    // in al, 0x10; mov rax, rsp; hlt
    let mut machine = returning(WITH_RF, &[0xe4, 0x10, 0x48, 0x89, 0xe0, 0xf4]);
    assert!(matches!(machine.run(), Exit::Io(_)));
    let state = machine.vcpu.state();
    assert_eq!((state.rip, state.rflags), (TARGET, WITH_RF));
    machine.vcpu.complete_io(&[1]);
    assert_eq!(machine.vcpu.state().rflags, rflags::FIXED);
    assert_eq!(result(&mut machine), STACK - 0x100);
}

#[test]
fn what_follows_does_not_see_it() {
    // nop; int3
    for target in [&[0x90, 0xcc][..], &[0xcc]] {
        let mut machine = returning(WITH_RF, target);
        handle(&machine, vector::BP, TELL_FLAGS);
        assert_eq!(result(&mut machine), rflags::FIXED);
    }
    // pushfq; pop rax; hlt
    let mut machine = returning(WITH_RF, &[0x9c, 0x58, 0xf4]);
    assert_eq!(result(&mut machine), rflags::FIXED);
    // cpuid; pushfq; pop rax; hlt
    let mut machine = returning(WITH_RF, &[0x0f, 0xa2, 0x9c, 0x58, 0xf4]);
    assert_eq!(result(&mut machine), rflags::FIXED);
}

#[test]
fn a_breakpoint_is_passed_once() {
    // inc ebx; cmp ebx, 2; jb -7; hlt
    let mut machine = returning(WITH_RF, &[0xff, 0xc3, 0x83, 0xfb, 2, 0x72, 0xf9, 0xf4]);
    // lea eax, [rbx + 0x100]; hlt
    handle(&machine, vector::DB, &[0x8d, 0x83, 0, 1, 0, 0, 0xf4]);
    let state = machine.vcpu.state_mut();
    (state.dr[0], state.dr7) = (TARGET, 0x402);
    assert_eq!(result(&mut machine), 0x101);
}

#[test]
fn a_fault_that_is_mended_costs_no_step() {
    const PAGES: u64 = 64;
    // A page table for the 2 MiB at DATA, with nothing present.
    const TABLE: u64 = 0x7000;
    // l: mov rdx, [rdi]; add rdi, 4096; dec ecx; jnz l; hlt
    let code = [
        0x48, 0x8b, 0x17, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf2, 0xf4,
    ];
    let mut machine = returning(WITH_RF, &code);
    machine.write_word(0x3000 + 8 * (DATA >> 21), TABLE | 7);
    for page in 0..512 {
        machine.write_word(TABLE + 8 * page, (DATA + 4096 * page) | 0x66);
    }
    // inc ebx; or qword [rsi], 1; add rsi, 8; add rsp, 8; iretq
    let mend = [
        0xff, 0xc3, 0x48, 0x83, 0x0e, 1, 0x48, 0x83, 0xc6, 8, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf,
    ];
    handle(&machine, vector::PF, &mend);
    let state = machine.vcpu.state_mut();
    // The stack is in the same 2 MiB.
    state.gpr[4] = 0xf_0000;
    (state.gpr[1], state.gpr[6], state.gpr[7]) = (PAGES, TABLE, DATA);
    state.rip = TARGET;
    assert_eq!(machine.run_to_halt().gpr[3], PAGES);
    // An instruction that runs alone leaves behind itself.
    let exits = &machine.vcpu.mmu().stats().engine;
    let left = exits.exit_link.get() + exits.exit_indirect.get() + exits.exit_stale.get();
    assert!(left < PAGES / 2, "{exits:?}");
}
