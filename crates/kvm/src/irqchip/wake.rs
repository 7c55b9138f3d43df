//! How an interrupt controller reaches a vCPU, and how a halted vCPU sleeps.
//!
//! Posting an interrupt is one atomic OR into the target's IRR followed by [`VcpuWake::interrupt`];
//! no lock is taken on the way. The other side must look at the IRR *after* it has said that it is
//! about to sleep or to run: [`HaltGate`] is such a place to sleep.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The way to one vCPU's thread. The methods may be called from any thread, and hold no lock.
pub trait VcpuWake: Send + Sync {
    /// A maskable interrupt may be deliverable now: end a `HLT`, or have running guest code ask
    /// [`cpu::Platform::interrupt_pending`] soon.
    fn interrupt(&self);
    /// The run loop itself has something to do (NMI, INIT, SIPI, SMI, unhalt, an EOI that the
    /// monitor must see): end a `HLT`, or leave guest code.
    fn request(&self);
    /// A device of the monitor's may have written to guest memory: what is known of code there
    /// holds no longer. Wakes nobody.
    fn memory_written(&self) {}
}

/// Where a halted vCPU waits. One waiter, any number of wakers.
///
/// | state   | the waiter                       | a waker makes it            |
/// |---------|----------------------------------|-----------------------------|
/// | `OPEN`  | runs, or has been woken          | `OPEN` (nothing to do)      |
/// | `SHUT`  | checks its wake conditions       | `OPEN`                      |
/// | `ASLEEP`| sleeps in `futex(FUTEX_WAIT)`    | `OPEN`, and wakes the futex |
#[derive(Debug, Default)]
pub struct HaltGate {
    state: AtomicU32,
}

const OPEN: u32 = 0;
const SHUT: u32 = 1;
const ASLEEP: u32 = 2;

/// How [`HaltGate::wait`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Somebody called [`HaltGate::open`] (or nobody: look at the wake conditions).
    Opened,
    /// The time was up.
    TimedOut,
    /// A signal was handled in this thread.
    Interrupted,
}

impl HaltGate {
    /// Ends the wait that is going on, if there is one. Any thread.
    pub fn open(&self) {
        // SeqCst on both sides: either the waker sees SHUT, or the waiter sees what was posted
        // before this call.
        if self.state.swap(OPEN, Ordering::SeqCst) == ASLEEP {
            futex_wake(&self.state);
        }
    }

    /// The waiter is about to look at its wake conditions. Call it before looking; then call
    /// [`Self::wait`], or [`Self::cancel`] if there is a reason not to.
    pub fn shut(&self) {
        self.state.store(SHUT, Ordering::SeqCst);
    }

    /// The waiter has found a reason not to sleep.
    pub fn cancel(&self) {
        self.state.store(OPEN, Ordering::SeqCst);
    }

    /// Sleeps until [`Self::open`], a signal, or the end of `timeout`.
    ///
    /// With a timeout, the thread's timer slack is set to the least there is, once and for all: the
    /// kernel's default, 50 us, would make every timer of the guest late.
    pub fn wait(&self, timeout: Option<Duration>) -> Woken {
        if timeout.is_some() {
            be_punctual();
        }
        if self
            .state
            .compare_exchange(SHUT, ASLEEP, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            return Woken::Opened;
        }
        let woken = futex_wait(&self.state, ASLEEP, timeout);
        self.cancel();
        woken
    }
}

#[expect(unsafe_code, reason = "prctl(2) has no safe wrapper")]
fn be_punctual() {
    thread_local!(static DONE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    if !DONE.replace(true) {
        // SAFETY: this option takes one number, and concerns this thread's timers only.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    }
}

#[expect(unsafe_code, reason = "futex(2) has no safe wrapper")]
fn futex_wake(word: &AtomicU32) {
    // SAFETY: the address is that of a live, aligned 32-bit word for the duration of the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        );
    }
}

#[expect(unsafe_code, reason = "futex(2) has no safe wrapper")]
fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> Woken {
    let timeout = timeout.map(|t| libc::timespec {
        tv_sec: t.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: t.subsec_nanos().into(),
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timeout (or null) are live and aligned for the duration of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            timeout,
        )
    };
    if result == 0 {
        return Woken::Opened;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::ETIMEDOUT) => Woken::TimedOut,
        Some(libc::EINTR) => Woken::Interrupted,
        _ => Woken::Opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_open_between_the_check_and_the_sleep_is_not_lost() {
        let gate = HaltGate::default();
        gate.shut();
        gate.open();
        assert_eq!(gate.wait(Some(Duration::from_secs(20))), Woken::Opened);
    }

    #[test]
    fn a_sleeper_is_woken_from_another_thread() {
        let gate = Arc::new(HaltGate::default());
        let other = Arc::clone(&gate);
        gate.shut();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            other.open();
        });
        assert_eq!(gate.wait(Some(Duration::from_secs(20))), Woken::Opened);
        waker.join().unwrap();
    }

    #[test]
    fn the_time_runs_out() {
        let gate = HaltGate::default();
        gate.shut();
        assert_eq!(gate.wait(Some(Duration::from_millis(1))), Woken::TimedOut);
    }
}
