//! Atomics, locks and waiting, as the standard library has them; but for two builds of the tests.
//!
//! - Under `cfg(loom)` they are loom's, which runs a test under every order of steps that the
//!   language's memory model allows. Only the handshakes between threads that `models` checks are built
//!   on them (`cargo xtask loom`).
//! - Under `cfg(tsan)` the locks are ones that `ThreadSanitizer` sees (`cargo xtask tsan`). The standard
//!   library is compiled without it, so of a lock that had to wait it sees nothing, and takes all that
//!   the lock protects for a race.

#[cfg(tsan)]
mod seen;

#[cfg(not(any(loom, tsan)))]
mod real {
    pub use std::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::Mutex as UnmodelledMutex;
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

#[cfg(tsan)]
mod real {
    pub use super::seen::{Condvar, Mutex, MutexGuard};

    pub(crate) use super::seen::Mutex as UnmodelledMutex;
    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

#[cfg(loom)]
mod real {
    pub use loom::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    pub(crate) use loom::thread::yield_now as spin_loop;
    /// One under which no other step is taken, so that a model has nothing to try there.
    pub(crate) use std::sync::Mutex as UnmodelledMutex;
}

pub(crate) use real::{AtomicU32, AtomicU64, Ordering, UnmodelledMutex, spin_loop};
pub use real::{Condvar, Mutex, MutexGuard};

use std::sync::PoisonError;

/// Locks; a panic of another holder is that thread's affair.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until told to look again.
pub fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}
