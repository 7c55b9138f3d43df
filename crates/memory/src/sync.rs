//! Atomics, locks and waiting, as the standard library has them; under `cfg(loom)` those of loom,
//! which runs a test under every order of steps that the language's memory model allows.
//!
//! Only the handshakes between threads that `models` checks are built on it (`cargo xtask loom`).

#[cfg(not(loom))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) use std::hint::spin_loop;
}

#[cfg(loom)]
mod real {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) use loom::thread::yield_now as spin_loop;
}

pub(crate) use real::*;

use std::sync::PoisonError;

/// Locks; a panic of another holder is that thread's affair.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until told to look again.
pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}
