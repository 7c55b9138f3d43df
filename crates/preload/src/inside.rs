//! Whether this thread is inside our own code.
//!
//! Our code calls the C library too. While it does, the interposed functions step aside.

use std::cell::Cell;

thread_local! {
    // `const` and without a destructor: readable from a signal handler and at thread exit.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// Marks this thread as inside until dropped.
pub(crate) struct Inside(());

impl Inside {
    /// Enters.
    pub(crate) fn enter() -> Self {
        INSIDE.with(|n| n.set(n.get() + 1));
        Self(())
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|n| n.set(n.get() - 1));
    }
}

/// Whether this thread is inside our own code.
pub(crate) fn is_inside() -> bool {
    INSIDE.with(Cell::get) > 0
}
