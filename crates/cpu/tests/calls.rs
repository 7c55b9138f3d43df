//! Calls and returns that don't come in pairs, or find other code than they left: what the host's
//! return stack predicts is never what the guest gets by it.

#![expect(unsafe_code, reason = "names machine code, and reads its bytes")]

mod machine;

use std::arch::global_asm;
use std::thread;
use std::time::Duration;

use cpu::{Branches, Exit};
use machine::{CODE, DATA, Machine, STACK};
use memory::quiesce::Requests;

macro_rules! guests {
    ($($name:ident, $asm:literal;)*) => {
        $(global_asm!(
            concat!(".globl guest_", stringify!($name)),
            concat!(".globl guest_end_", stringify!($name)),
            concat!("guest_", stringify!($name), ":"),
            $asm,
            concat!("guest_end_", stringify!($name), ":"),
        );

        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name))]
                safe static START: u8;
                #[link_name = concat!("guest_end_", stringify!($name))]
                safe static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both are labels of one `global_asm!`, in this order.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        })*
    };
}

guests! {
    returns_elsewhere, "
        mov ecx, 1000
        xor eax, eax
    2:  call 3f
        hlt
        add rax, 3
        dec rcx
        jnz 2b
        hlt
    3:  inc qword ptr [rsp]
        ret";
    unpaired, "
        mov ecx, 1000
        xor eax, eax
    2:  call 3f
    3:  pop rdx
        lea rbx, [rip + 4f]
        push rbx
        ret
        hlt
    4:  add rax, rdx
        dec rcx
        jnz 2b
        hlt";
    called_landing, "
        mov ecx, 100
        lea rbx, [rip + 2f]
        xor eax, eax
        call 4f
    2:  inc rax
        dec rcx
        jz 3f
        test cl, 1
        jz 4f
        call rbx
    3:  hlt
    4:  mov rsp, rdi
        push rbx
        ret";
    shared, "
        mov ecx, 1000
        xor eax, eax
        lea rbx, [rip + 5f]
    2:  test cl, 1
        jz 3f
        jmp 4f
    3:  inc rax
    4:  add rax, 2
        call 5f
        add rax, 4
        call rbx
        dec rcx
        jnz 2b
        hlt
    5:  add rax, 100
        ret";
    patches_its_caller, "
        mov ecx, 200
        xor eax, eax
    2:  call 4f
    3:  add rax, 0
        dec rcx
        jnz 2b
        hlt
    4:  lea rbx, [rip + 3b]
        mov edx, ecx
        and edx, 0x3f
        mov [rbx + 3], dl
        ret";
    halts_inside, "
        call 2f
        mov eax, 1
        hlt
    2:  hlt
        ret";
    returns_for_ever, "
        inc rbp
        mov rsp, rdi
        ret";
    calls_for_ever, "
    2:  inc rbp
        mov rsp, rsi
        call 2b";
    returns_nowhere, "
        nop
        ret";
    recursion, "
        call 2f
        hlt
    2:  inc rax
        dec rcx
        jz 3f
        push rcx
        call 2b
        pop rcx
        add rbx, rcx
        ret
    3:  hlt
        ret";
}

/// A machine for each way of branching.
fn machines(code: &[u8]) -> [Machine; 2] {
    [Branches::Jrcxz, Branches::Loop].map(|branches| {
        let mut machine = Machine::new(code);
        machine.vcpu.set_branches(branches);
        machine
    })
}

#[test]
fn a_function_that_returns_elsewhere() {
    for mut machine in machines(returns_elsewhere()) {
        let state = machine.run_to_halt();
        assert_eq!((state.gpr[0], state.gpr[4]), (3000, STACK));
    }
}

#[test]
fn calls_that_never_return_and_returns_that_were_never_called() {
    for mut machine in machines(unpaired()) {
        let state = machine.run_to_halt();
        let here = CODE + 12;
        assert_eq!((state.gpr[2], state.gpr[0]), (here, 1000 * here));
        assert_eq!(state.gpr[4], STACK);
    }
}

/// It comes there by returns, by calls and by returns without a call in turn.
#[test]
fn a_call_to_where_a_call_returns() {
    for mut machine in machines(called_landing()) {
        machine.vcpu.state_mut().gpr[7] = STACK - 64;
        assert_eq!(machine.run_to_halt().gpr[0], 100);
    }
}

#[test]
fn one_call_in_several_blocks() {
    for mut machine in machines(shared()) {
        assert_eq!(machine.run_to_halt().gpr[0], 500 + 1000 * 206);
    }
}

#[test]
fn a_function_that_changes_what_is_behind_its_call() {
    for mut machine in machines(patches_its_caller()) {
        let expected: u64 = (1..=200).map(|round| round & 0x3f).sum();
        assert_eq!(machine.run_to_halt().gpr[0], expected);
    }
}

/// From outside, and while the vCPU has left in the middle of the function.
#[test]
fn code_behind_a_call_that_is_changed_meanwhile() {
    for mut machine in machines(halts_inside()) {
        for value in [1, 2, 3_u8] {
            machine.vcpu.state_mut().rip = CODE;
            assert_eq!(machine.run(), Exit::Halt);
            machine.write(CODE + 6, &[value]);
            assert_eq!(machine.run_to_halt().gpr[0], u64::from(value));
        }
    }
}

fn obeys_a_kick(code: &[u8]) {
    for mut machine in machines(code) {
        machine.write_word(DATA, CODE);
        let state = machine.vcpu.state_mut();
        (state.gpr[7], state.gpr[6]) = (DATA, STACK - 64);
        let kicker = machine.vcpu.kicker();
        let kicking = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            kicker.request(Requests::EXIT);
        });
        assert_eq!(machine.run(), Exit::Interrupted);
        kicking.join().expect("it only kicks");
        assert!(machine.vcpu.state().gpr[5] > 100);
    }
}

#[test]
fn returns_without_end_obey_a_kick() {
    obeys_a_kick(returns_for_ever());
}

#[test]
fn calls_without_end_obey_a_kick() {
    obeys_a_kick(calls_for_ever());
}

/// The fault leaves everything as it was; without a table of interrupts it ends in a shutdown.
#[test]
fn a_return_to_no_address() {
    for mut machine in machines(returns_nowhere()) {
        for bad in [1 << 63, (CODE + 1) ^ (1 << 62), (CODE + 1) ^ (1 << 47)] {
            machine.write_word(STACK - 64, bad);
            let state = machine.vcpu.state_mut();
            (state.rip, state.gpr[4]) = (CODE, STACK - 64);
            assert_eq!(machine.run(), Exit::Shutdown);
            let state = machine.vcpu.state();
            assert_eq!((state.rip, state.gpr[4]), (CODE + 1, STACK - 64));
        }
    }
}

/// In the middle of a deep recursion all translations are thrown away.
#[test]
fn returns_to_calls_whose_translation_is_gone() {
    for mut machine in machines(recursion()) {
        for branches in [Branches::Loop, Branches::Jrcxz] {
            let state = machine.vcpu.state_mut();
            (state.rip, state.gpr[4]) = (CODE, STACK);
            (state.gpr[1], state.gpr[0], state.gpr[3]) = (500, 0, 0);
            assert_eq!(machine.run(), Exit::Halt);
            machine.vcpu.set_branches(branches);
            let state = machine.run_to_halt();
            assert_eq!((state.gpr[0], state.gpr[3]), (500, 499 * 500 / 2));
            assert_eq!(state.gpr[4], STACK);
        }
    }
}
