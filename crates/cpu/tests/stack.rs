//! Pushes and pops that share a check, and a host page in their way.

#![expect(
    unsafe_code,
    reason = "makes a page of guest RAM read-only, and gives it back"
)]

mod machine;

use std::thread;
use std::time::Duration;

use cpu::Exit;
use machine::{CODE, Machine, STACK};
use memory::quiesce::Requests;

fn protect(machine: &Machine, protection: i32) {
    let page = machine.host(STACK - 4096).raw() as *mut libc::c_void;
    // SAFETY: a page of this machine's RAM, to which no reference exists.
    let result = unsafe { libc::mprotect(page, 4096, protection) };
    assert_eq!(result, 0);
}

/// pop rax; pop rbx; push rcx; push rdx; hlt
#[test]
fn a_push_that_the_host_refuses() {
    let mut machine = Machine::new(&[0x58, 0x5b, 0x51, 0x52, 0xf4]);
    for refused in [false, true, false] {
        machine.write_word(STACK - 0x100, 11);
        machine.write_word(STACK - 0xf8, 12);
        if refused {
            protect(&machine, libc::PROT_READ);
        }
        let state = machine.vcpu.state_mut();
        state.rip = CODE;
        state.gpr[1] = 13;
        state.gpr[4] = STACK - 0x100;
        let exit = machine.run();
        protect(&machine, libc::PROT_READ | libc::PROT_WRITE);
        let state = machine.vcpu.state();
        assert_eq!((state.gpr[0], state.gpr[3]), (11, 12));
        if refused {
            assert!(matches!(exit, Exit::HostFault(_)), "{exit:?}");
            assert_eq!((state.rip, state.gpr[4]), (CODE + 2, STACK - 0xf0));
        } else {
            assert_eq!(exit, Exit::Halt);
            assert_eq!(state.gpr[4], STACK - 0x100);
            assert_eq!(machine.word(STACK - 0xf8), 13);
        }
    }
}

/// l: push rax; push rdx; pop rdi; pop rsi; add rbx, rdi; dec rdx; jnz l; hlt
const ROUNDS: [u8; 13] = [
    0x50, 0x52, 0x5f, 0x5e, 0x48, 0x01, 0xfb, 0x48, 0xff, 0xca, 0x75, 0xf4, 0xf4,
];

/// A machine at [`ROUNDS`] whose stack crosses a page in each round.
fn across_a_page(rounds: u64) -> Machine {
    let mut machine = Machine::new(&ROUNDS);
    let state = machine.vcpu.state_mut();
    state.gpr[0] = 0x1234;
    state.gpr[2] = rounds;
    state.gpr[3] = 0;
    state.gpr[4] = STACK - 4096 + 8;
    machine
}

#[test]
fn a_frame_across_a_page_leaves_once() {
    const COUNT: u64 = 100_000;
    let mut machine = across_a_page(COUNT);
    assert_eq!(machine.run(), Exit::Halt);
    let state = machine.vcpu.state();
    assert_eq!(state.gpr[3], COUNT * (COUNT + 1) / 2);
    assert_eq!((state.gpr[6], state.gpr[4]), (0x1234, STACK - 4096 + 8));
    let counters = &machine.vcpu.mmu().stats().engine;
    let left = counters.exit_span.get() + counters.exit_access.get() + counters.exit_stale.get();
    assert!(left < 10, "{counters:?}");
}

#[test]
fn a_frame_across_a_page_obeys_a_kick() {
    let mut machine = across_a_page(u64::MAX);
    let kicker = machine.vcpu.kicker();
    let kicking = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        kicker.request(Requests::EXIT);
    });
    assert_eq!(machine.run(), Exit::Interrupted);
    kicking.join().unwrap();
}

#[test]
fn a_frame_across_a_page_in_code_that_changes() {
    let mut machine = across_a_page(100);
    assert_eq!(machine.run(), Exit::Halt);
    // sub rbx, rdi
    machine.write(CODE + 4, &[0x48, 0x29, 0xfb]);
    let state = machine.vcpu.state_mut();
    (state.rip, state.gpr[2], state.gpr[3]) = (CODE, 100, 0);
    assert_eq!(machine.run(), Exit::Halt);
    assert_eq!(machine.vcpu.state().gpr[3], 5050_u64.wrapping_neg());
}
