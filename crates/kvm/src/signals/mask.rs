//! Sets of signals, and a thread's mask.
//!
//! The masks are changed by the system call itself: the C library's function leaves out the signals
//! that it keeps for itself, of which cancellation ([`CANCEL`]) is deferred like any other.

use std::ptr;

use libc::c_int;

use crate::errno::Errno;

/// Highest signal number of Linux.
pub(super) const LAST: usize = 64;
/// The C library's signal for `pthread_cancel`.
pub(super) const CANCEL: c_int = 32;
/// The C library's signal by which `setuid` reaches all threads.
pub(super) const SETXID: c_int = 33;
/// Never deferred.
pub(super) const SYNCHRONOUS: [c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// A set of signals in the kernel's form: bit 0 is signal 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct SignalSet(pub u64);

impl SignalSet {
    pub(super) fn has(self, signal: c_int) -> bool {
        self.0 >> (signal - 1) & 1 != 0
    }

    /// All signals that can be deferred.
    pub(super) const fn deferrable() -> Self {
        let mut set = !(1 << (SETXID - 1));
        let mut i = 0;
        while i < SYNCHRONOUS.len() {
            set &= !(1 << (SYNCHRONOUS[i] - 1));
            i += 1;
        }
        Self(set)
    }

    /// Without those that must reach a thread at once.
    pub(super) fn without_synchronous(self) -> Self {
        Self(self.0 & Self::deferrable().0)
    }
}

/// Replaces this thread's mask; gives the old one.
pub(super) fn set_mask(mask: SignalSet) -> SignalSet {
    let mut old = 0u64;
    // SAFETY: both sets are ours, and as large as we say.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask.0,
            &raw mut old,
            size_of::<u64>(),
        );
    }
    SignalSet(old)
}

/// The calling thread's mask.
pub(super) fn thread_mask() -> SignalSet {
    let mut old = 0u64;
    // SAFETY: only reads the mask.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            ptr::null::<u64>(),
            &raw mut old,
            size_of::<u64>(),
        );
    }
    SignalSet(old)
}

/// The mask of `KVM_SET_SIGNAL_MASK`: 8 bytes.
pub fn mask_from(len: u32, bits: u64) -> Result<SignalSet, Errno> {
    if len as usize != size_of::<u64>() {
        return Err(Errno::EINVAL);
    }
    // SIGKILL and SIGSTOP can't be blocked.
    Ok(SignalSet(
        bits & !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1)),
    ))
}

/// Blocks all signals in this thread until dropped: threads that are started meanwhile never run a
/// handler of the program's.
pub(crate) struct Blocked(SignalSet);

impl Blocked {
    /// Begins.
    pub(crate) fn all() -> Self {
        Self(set_mask(SignalSet::deferrable()))
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        set_mask(self.0);
    }
}
