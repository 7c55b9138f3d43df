//! What parent and child share.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::case::{Case, Outcome, Program};
use crate::layout::DATA_BYTES;

/// The most programs handed over at once.
pub(super) const PROGRAMS: usize = 64;
/// The most cases handed over at once.
pub(super) const CASES: usize = 128;

/// Whose turn it is: the parent fills the mailbox and reads it.
pub(super) const PARENT: u32 = 0;
/// Whose turn it is: the child runs the cases.
pub(super) const CHILD: u32 = 1;

/// The shared page set. Only the side whose turn it is touches anything but `turn`.
#[repr(C)]
pub(super) struct Mailbox {
    pub(super) turn: AtomicU32,
    /// The case that runs: what to blame when the child dies.
    pub(super) current: AtomicU32,
    pub(super) count: u32,
    pub(super) programs: [Program; PROGRAMS],
    pub(super) cases: [Case; CASES],
    pub(super) pattern: [u8; DATA_BYTES],
    pub(super) outcomes: [Outcome; CASES],
}

/// Gives the turn away.
pub(super) fn pass_turn(turn: &AtomicU32, to: u32) {
    turn.store(to, Ordering::Release);
    futex(turn, libc::FUTEX_WAKE, 1, std::ptr::null());
}

/// Waits until it is no longer the turn of `other`, or until the time is over.
pub(super) fn wait_turn(turn: &AtomicU32, other: u32, limit: Option<Duration>) -> bool {
    let timeout = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    for _ in 0..2 {
        if turn.load(Ordering::Acquire) != other {
            return true;
        }
        futex(turn, libc::FUTEX_WAIT, other, timeout);
    }
    turn.load(Ordering::Acquire) != other
}

#[expect(unsafe_code, reason = "futex has no wrapper in libc")]
fn futex(word: &AtomicU32, operation: i32, value: u32, timeout: *const libc::timespec) {
    // SAFETY: the word outlives the call, the timeout is null or a local of the caller; failure
    // (EAGAIN, EINTR, ETIMEDOUT) is seen by the caller's look at the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout) };
}
