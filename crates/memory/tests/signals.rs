//! Faults that are not ours: each in a child process of its own, which the test then buries.

#![expect(unsafe_code, reason = "fork, and faults on purpose")]

use addr::Hva;
use memory::access;

/// How a child ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exited(i32),
    Killed(i32),
}

/// Runs `f` in a child. The child has one thread and leaves without running any destructor.
fn in_child(f: fn()) -> End {
    access::install();
    // SAFETY: the child calls `f`, which keeps to what is allowed in a signal handler, and `_exit`.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            f();
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            End::Killed(libc::WTERMSIG(status))
        } else {
            End::Exited(libc::WEXITSTATUS(status))
        }
    }
}

fn fault() {
    // SAFETY: not at all: nothing is mapped there, and the load is in no table.
    unsafe { std::arch::asm!("mov al, byte ptr [{p}]", p = in(reg) 8_u64, out("al") _) };
}

extern "C" fn leave_with_42(_signal: libc::c_int) {
    // SAFETY: `_exit` is always allowed.
    unsafe { libc::_exit(42) };
}

/// What the program's own call of `sigaction` would have done before us.
fn set_previous(handler: libc::sighandler_t) {
    // SAFETY: an all-zero action is valid: the default one, an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    access::replace_previous(libc::SIGSEGV, &action).expect("our handler stands there");
}

#[test]
fn a_fault_of_the_program_kills_it() {
    assert_eq!(in_child(fault), End::Killed(libc::SIGSEGV));
    let by_default = || {
        set_previous(libc::SIG_DFL);
        fault();
    };
    assert_eq!(in_child(by_default), End::Killed(libc::SIGSEGV));
    let ignored = || {
        set_previous(libc::SIG_IGN);
        fault();
    };
    assert_eq!(in_child(ignored), End::Killed(libc::SIGSEGV));
}

#[test]
fn the_programs_handler_gets_what_is_not_ours() {
    let end = in_child(|| {
        set_previous(leave_with_42 as *const () as libc::sighandler_t);
        if access::load_word::<u8>(Hva::new(8)).is_ok() {
            // SAFETY: always allowed.
            unsafe { libc::_exit(1) };
        }
        fault();
    });
    assert_eq!(end, End::Exited(42));
}

#[test]
fn a_signal_that_was_sent_is_not_taken_for_a_fault() {
    let end = in_child(|| {
        set_previous(libc::SIG_DFL);
        // SAFETY: a signal to ourselves.
        unsafe { libc::raise(libc::SIGSEGV) };
    });
    assert_eq!(end, End::Killed(libc::SIGSEGV));
}
