//! `sigaction` and `signal`: so that a signal ends `KVM_RUN`.
//!
//! In the kernel, `KVM_RUN` returns `EINTR` when a signal is pending for the thread, and the
//! program's handler runs on the way back. In user space the handler runs first, in the middle of
//! guest code, and only a handler can know that. So each handler of the program is installed behind
//! [`trampoline`], which asks the running vCPU to leave and then calls the program's own. What the
//! program reads back with `sigaction` is what it has set.
//!
//! The signals of a fault of the CPU belong to the engine, too: guest memory that the host can't
//! provide raises `SIGBUS` in the middle of guest code. The engine's handler stays in place for
//! those, and the program's becomes the one that it hands a fault on to.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::inside::is_inside;
use crate::next::next;

/// Signals 1 to 64.
const SIGNALS: usize = 65;
/// Set in [`HANDLERS`] where the handler takes three arguments. User addresses are below 2^47.
const SIGINFO: usize = 1 << 63;

/// The program's handler of each signal that stands behind the trampoline; 0 where none does.
static HANDLERS: [AtomicUsize; SIGNALS] = [const { AtomicUsize::new(0) }; SIGNALS];

type Handler = unsafe extern "C" fn(c_int);
type InfoHandler = unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// The C library's `sigaction`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let index = usize::try_from(signal)
        .ok()
        .filter(|s| (1..SIGNALS).contains(s));
    let (Some(index), false) = (index, is_inside()) else {
        return real(signal, new, old);
    };
    // SAFETY: null or the program's own, by the C library's contract.
    let (new, old) = unsafe { (new.as_ref(), old.as_mut()) };
    let before = HANDLERS[index].load(Ordering::Acquire);
    let mut previous = empty();
    let behind_ours = match new {
        Some(new) => memory::access::replace_previous(signal, new),
        None => memory::access::previous(signal),
    };
    let answer = match (behind_ours, new) {
        (Some(action), _) => {
            previous = action;
            0
        }
        (None, Some(new)) => install(signal, index, new, &mut previous),
        (None, None) => real(signal, std::ptr::null(), &raw mut previous),
    };
    if let (0, Some(old)) = (answer, old) {
        *old = as_the_program_set_it(previous, before);
    }
    answer
}

/// The C library's `signal` (BSD semantics: restarting, not reset).
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    let mut new = empty();
    new.sa_sigaction = handler;
    new.sa_flags = libc::SA_RESTART;
    let mut old = empty();
    // SAFETY: both are valid for the call.
    match unsafe { sigaction(signal, &raw const new, &raw mut old) } {
        0 => old.sa_sigaction,
        _ => libc::SIG_ERR,
    }
}

fn install(
    signal: c_int,
    index: usize,
    new: &libc::sigaction,
    previous: &mut libc::sigaction,
) -> c_int {
    if matches!(new.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
        return real(signal, new, previous);
    }
    let siginfo = if new.sa_flags & libc::SA_SIGINFO == 0 {
        0
    } else {
        SIGINFO
    };
    // Before the trampoline stands there: it must find a handler. A signal that comes in between,
    // through a trampoline that stood there already, may as well reach the new handler.
    HANDLERS[index].store(new.sa_sigaction | siginfo, Ordering::Release);
    let mut behind = *new;
    behind.sa_sigaction = trampoline as *const () as usize;
    behind.sa_flags |= libc::SA_SIGINFO;
    real(signal, &raw const behind, previous)
}

/// The action that the kernel reports, with the trampoline replaced by what stands behind it.
fn as_the_program_set_it(mut action: libc::sigaction, handler: usize) -> libc::sigaction {
    if action.sa_sigaction == trampoline as *const () as usize {
        action.sa_sigaction = handler & !SIGINFO;
        if handler & SIGINFO == 0 {
            action.sa_flags &= !libc::SA_SIGINFO;
        }
    }
    action
}

/// Stands before each handler of the program.
unsafe extern "C" fn trampoline(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    kvm::signals::note_delivery();
    let Some(place) = usize::try_from(signal).ok().and_then(|s| HANDLERS.get(s)) else {
        return;
    };
    let handler = place.load(Ordering::Acquire);
    let address = handler & !SIGINFO;
    // SAFETY: the address is that of the handler which the program installed for this signal, and
    // SIGINFO says which of the two signatures it has; the arguments are the kernel's.
    unsafe {
        if handler & SIGINFO == 0 {
            std::mem::transmute::<usize, Handler>(address)(signal);
        } else {
            std::mem::transmute::<usize, InfoHandler>(address)(signal, info, context);
        }
    }
}

fn real(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    next!(
        c"sigaction"
            as fn(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int
    )
}

fn empty() -> libc::sigaction {
    // SAFETY: a C structure of integers and pointers; zero is a value of each.
    unsafe { std::mem::zeroed() }
}
