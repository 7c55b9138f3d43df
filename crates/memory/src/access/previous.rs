//! The handlers that stood before ours, to which a fault that is not ours goes.
//!
//! A program in which this code is a guest may set its handler at any time. Ours must stay in place,
//! so whoever sees the program's call (a preload library) makes it the one behind ours instead of
//! the one in front.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The signals that this module's handler serves.
pub(super) const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

static PREVIOUS: [AtomicPtr<libc::sigaction>; 2] =
    [const { AtomicPtr::new(ptr::null_mut()) }; SIGNALS.len()];

fn place(signal: libc::c_int) -> Option<&'static AtomicPtr<libc::sigaction>> {
    let index = SIGNALS.iter().position(|s| *s == signal)?;
    Some(&PREVIOUS[index])
}

/// The action behind our handler for `signal`, or `None` where our handler does not stand there.
pub fn previous(signal: libc::c_int) -> Option<libc::sigaction> {
    let action = place(signal)?.load(Ordering::Acquire);
    // SAFETY: null, or what `set` leaked: it lives for ever and is never written again.
    unsafe { action.as_ref() }.copied()
}

/// Makes `action` the one behind our handler and gives the one before, or `None` (and changes
/// nothing) where our handler does not stand there.
pub fn replace_previous(signal: libc::c_int, action: &libc::sigaction) -> Option<libc::sigaction> {
    let before = previous(signal)?;
    set(signal, *action);
    Some(before)
}

/// Remembers the action behind our handler.
pub(super) fn set(signal: libc::c_int, action: libc::sigaction) {
    if let Some(place) = place(signal) {
        // Leaked, also when it is replaced: a handler on another thread may be reading it. Programs
        // set these handlers a handful of times.
        place.store(Box::leak(Box::new(action)), Ordering::Release);
    }
}
