//! A timer that interrupts `KVM_RUN` with a signal: a guest may halt for ever.

use std::ptr;
use std::time::Duration;

const SIGNAL: libc::c_int = libc::SIGUSR1;

pub(crate) struct Watch(libc::timer_t);

extern "C" fn nothing(_: libc::c_int) {}

impl Watch {
    /// A timer for this thread.
    pub(crate) fn new() -> Watch {
        // SAFETY: a handler that does nothing, and a timer that signals this thread, which drops
        // the timer before it ends.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            assert_eq!(
                libc::sigaction(SIGNAL, &raw const action, ptr::null_mut()),
                0
            );
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGNAL;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = ptr::null_mut();
            let made = libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer);
            assert_eq!(made, 0);
            Watch(timer)
        }
    }

    fn set(&self, first: Duration, then: Duration) {
        let spec = |d: Duration| libc::timespec {
            tv_sec: d.as_secs() as libc::time_t,
            tv_nsec: i64::from(d.subsec_nanos()),
        };
        let value = libc::itimerspec {
            it_interval: spec(then),
            it_value: spec(first),
        };
        // SAFETY: our own timer.
        unsafe { libc::timer_settime(self.0, 0, &raw const value, ptr::null_mut()) };
    }

    /// Signals after `patience`, again and again, while `work` runs: one signal alone might come
    /// before the call that it shall interrupt.
    pub(crate) fn during<T>(&self, patience: Duration, work: impl FnOnce() -> T) -> T {
        self.set(patience, Duration::from_millis(5));
        let result = work();
        self.set(Duration::ZERO, Duration::ZERO);
        result
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // SAFETY: our own timer.
        unsafe { libc::timer_delete(self.0) };
    }
}
