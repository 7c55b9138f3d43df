//! `sigaction` and `signal`: so that a signal ends `KVM_RUN`, and never the engine.
//!
//! [`kvm::signals`] stands in front of the program's handlers, to defer a signal that comes in the
//! middle of guest code until that code was left. What the program reads back is what it has set.
//!
//! The signals of a fault of the CPU belong to the engine, too: guest memory that the host can't
//! provide raises `SIGBUS` in the middle of guest code. The engine's handler stays in place for
//! those, and the program's becomes the one that it hands a fault on to.

use std::ffi::c_int;

use crate::inside::{Inside, is_inside};
use crate::next::next;

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
    if is_inside() {
        return next!(
            c"sigaction"
                as fn(
                    signal: c_int,
                    new: *const libc::sigaction,
                    old: *mut libc::sigaction,
                ) -> c_int
        );
    }
    let _inside = Inside::enter();
    // SAFETY: null or the program's own, by the C library's contract.
    unsafe {
        let behind_ours = match new.as_ref() {
            Some(new) => memory::access::replace_previous(signal, new),
            None => memory::access::previous(signal),
        };
        let Some(action) = behind_ours else {
            return kvm::signals::sigaction(signal, new, old);
        };
        if let Some(old) = old.as_mut() {
            *old = action;
        }
    }
    0
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
