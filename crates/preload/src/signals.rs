//! `sigaction`, `signal` and `pthread_cancel`: so that a signal ends `KVM_RUN`, and never the engine.
//!
//! [`kvm::signals`] stands in front of the program's handlers, to defer a signal that comes in the
//! middle of one of our calls until that has ended. What the program reads back is what it has set.
//! The signals of a fault of the CPU belong to the engine, too; the program's handler becomes the one
//! that it hands a fault on to.

use std::ffi::c_int;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;

use kvm::signals::Call;

use crate::next::next;
use crate::process;

/// The C library's `sigaction`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    if Call::is_running() {
        return next!(
            c"sigaction"
                as fn(
                    signal: c_int,
                    new: *const libc::sigaction,
                    old: *mut libc::sigaction,
                ) -> c_int
        );
    }
    let _call = Call::enter();
    // SAFETY: null or the program's own, by the C library's contract.
    unsafe { kvm::signals::sigaction(signal, new, old) }
}

/// The C library's `signal` (BSD semantics: restarting, not reset).
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn signal(
    signal: c_int,
    handler: libc::sighandler_t,
) -> libc::sighandler_t {
    // SAFETY: C structures of integers and pointers, of which zero is a value.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler;
    new.sa_flags = libc::SA_RESTART;
    // SAFETY: both are valid for the call.
    match unsafe { sigaction(signal, &raw const new, &raw mut old) } {
        0 => old.sa_sigaction,
        _ => libc::SIG_ERR,
    }
}

/// The C library's `pthread_cancel`. Its signal has no handler before the first use; that first one
/// is made here, on a thread of ours that is deaf to it, so that the handler can be adopted before
/// the signal comes.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pthread_cancel(thread: libc::pthread_t) -> c_int {
    static PREPARED: Once = Once::new();
    if !Call::is_running() && process::is_owner() {
        PREPARED.call_once(prepare_cancellation);
    }
    next!(c"pthread_cancel" as fn(thread: libc::pthread_t) -> c_int)
}

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}

const PTHREAD_CANCEL_DISABLE: c_int = 1;

fn prepare_cancellation() {
    let _call = Call::enter();
    let (deaf, is_deaf) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let spawned = std::thread::Builder::new().spawn(move || {
        // SAFETY: changes this thread's own state; the old one is not wanted.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, ptr::null_mut()) };
        // Both ends live until the thread is joined.
        let _ = deaf.send(());
        let _ = wait.recv();
    });
    let Ok(handle) = spawned else {
        return;
    };
    if is_deaf.recv().is_ok() {
        let thread = handle.as_pthread_t();
        next!(c"pthread_cancel" as fn(thread: libc::pthread_t) -> c_int);
        kvm::signals::adopt_cancellation();
    }
    drop(go);
    let _ = handle.join();
}
