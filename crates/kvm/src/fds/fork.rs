//! `fork`: the child has the parent's memory, and none of its threads.
//!
//! As in the kernel, a VM belongs to the process that made it, and its calls answer `EIO` in a child.
//! The locks that a child takes before it knows that are held over the `fork`, lest it inherit one
//! that a thread of the parent held.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{MutexGuard, Once, RwLockWriteGuard};

use super::registry::{Registry, write};
use crate::signals;

/// How many `fork`s lie between this process and the first.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// The generation of what is made now.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

type Held = (RwLockWriteGuard<'static, Registry>, MutexGuard<'static, ()>);

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

/// Follows the `fork`s of this process from now on.
pub fn follow_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: functions without arguments that do not unwind.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

extern "C" fn before() {
    let held = (write(), signals::order());
    HELD.with(|h| *h.borrow_mut() = Some(held));
}

extern "C" fn in_parent() {
    HELD.with(|h| h.borrow_mut().take());
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    in_parent();
}
