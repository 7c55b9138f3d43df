//! Pushes and pops that share a check, and a host page in their way.

#![expect(
    unsafe_code,
    reason = "makes a page of guest RAM read-only, and gives it back"
)]

mod machine;

use cpu::Exit;
use machine::{CODE, Machine, STACK};

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
