//! Loads, stores and copies at a host virtual address, which report a fault of the host instead of
//! dying of it.
//!
//! Guest memory is memory that somebody else may take away at any time: a file is truncated, a page
//! is made inaccessible with `mprotect`, a monitor hands over an address where nothing is mapped.
//! The kernel's KVM answers such an access with `EFAULT`, and so must we. Each access here is one
//! machine instruction with an entry in a fix-up table, as the kernel's `copy_from_user` is: where
//! it faults, the handler of `SIGSEGV` and `SIGBUS` finds the instruction in the table and goes on
//! behind it with an error. An access that does not fault costs what a plain one costs.
//!
//! # Soundness
//! The functions are safe although an [`Hva`] is only a number. The rule is the kernel's: the memory
//! at an address that reaches this module belongs to a guest, not to Rust. An `Hva` comes from a
//! [`crate::ram::GuestRam`] or from a memory slot, and whoever fills the slot table vouches for it.
//! Nobody holds a Rust reference into guest memory; all accesses to it are volatile.
//!
//! # Atomicity
//! An access of 1, 2, 4 or 8 bytes is one instruction: x86 makes it atomic where it is aligned, and
//! where it lies within one cache line (SDM 3A, 10.1.1). [`compare_exchange`] is atomic at any
//! alignment. Copies are not atomic, but each aligned word of a copy of at most eight bytes is.
//!
//! # Threads
//! A thread that accesses guest memory must not block `SIGSEGV` or `SIGBUS`: the kernel kills a
//! process that faults while the signal is blocked.

#![expect(
    unsafe_code,
    reason = "guest memory is reached by raw addresses, which no Rust type can own"
)]

mod copy;
mod handler;
mod instruction;

use addr::Hva;

pub use copy::{copy, fill, load, read, read_words, store, write, write_words};
pub use handler::{Context, Hook, Verdict, install, previous, register_hook, replace_previous};
pub use instruction::Word;

/// The host has no memory behind an address (to an API's caller: `EFAULT`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host faults at {hva}: {cause}")]
pub struct HostFault {
    /// The first byte that could not be reached (of an access of at most eight bytes: its first).
    pub hva: Hva,
    /// What the host said.
    pub cause: Cause,
}

/// What the host said to an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// Nothing is mapped there, or not for this kind of access (`SIGSEGV`).
    #[error("no mapping that allows the access")]
    Segment,
    /// The mapping has nothing behind it: the end of a truncated file, a failed read, no huge page
    /// left (`SIGBUS`).
    #[error("nothing behind the mapping")]
    Bus,
}

impl Cause {
    fn from_signal(signal: u32) -> Self {
        if signal == libc::SIGBUS as u32 {
            Self::Bus
        } else {
            Self::Segment
        }
    }
}

/// Reads a word.
#[inline]
pub fn load_word<T: Word>(hva: Hva) -> Result<T, HostFault> {
    // SAFETY: the memory at an `Hva` is the guest's (module documentation), and no reference to it
    // exists.
    unsafe { T::load(hva.raw()) }.map_err(|signal| fault(hva, signal))
}

/// Writes a word.
#[inline]
pub fn store_word<T: Word>(hva: Hva, value: T) -> Result<(), HostFault> {
    // SAFETY: as for `load_word`.
    unsafe { T::store(hva.raw(), value) }.map_err(|signal| fault(hva, signal))
}

/// Writes `new` where the word is `expected`, atomically (a locked instruction: a full barrier).
///
/// Returns the word that was there: the exchange took place where it equals `expected`.
#[inline]
pub fn compare_exchange<T: Word>(hva: Hva, expected: T, new: T) -> Result<T, HostFault> {
    // SAFETY: as for `load_word`.
    unsafe { T::compare_exchange(hva.raw(), expected, new) }.map_err(|signal| fault(hva, signal))
}

#[cold]
fn fault(hva: Hva, signal: u32) -> HostFault {
    HostFault {
        hva,
        cause: Cause::from_signal(signal),
    }
}

#[cfg(test)]
mod tests;
