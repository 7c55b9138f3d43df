//! Ends a guest that takes too long.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a guest may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// Calls a function if it isn't dropped in time.
pub struct Watch {
    over: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(interrupt: impl FnOnce() + Send + 'static) -> Self {
        let (over, waits) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            if waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                interrupt();
            }
        });
        Self {
            over: Some(over),
            thread: Some(thread),
        }
    }

    /// Sends this thread a signal that does nothing but interrupt a system call.
    pub fn signal_this_thread() -> Self {
        // SAFETY: a zeroed `sigaction` is a valid one; its handler does nothing.
        let thread = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut());
            libc::pthread_self()
        };
        Self::start(move || {
            // SAFETY: the thread waits for this one in `drop`.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR2) };
        })
    }
}

extern "C" fn nothing(_: libc::c_int) {}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.over.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the watch does not panic");
        }
    }
}
