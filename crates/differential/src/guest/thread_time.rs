//! How long a thread has worked.
//!
//! A limit in time of day says nothing on a busy machine: a thread that gets no processor for a
//! third of a second looks as if it hung. Limits here count what the thread itself used.

use std::time::Duration;

/// Processor time of the calling thread since it began.
#[expect(
    unsafe_code,
    reason = "the clock of a thread's processor time has no safe wrapper"
)]
pub fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a plain system call with a local argument.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A stretch of the calling thread's work.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    began: Duration,
}

impl Work {
    /// Begins now.
    pub fn begin() -> Self {
        Self {
            began: thread_time(),
        }
    }

    /// Processor time since then.
    pub fn so_far(self) -> Duration {
        thread_time().saturating_sub(self.began)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_no_work() {
        let work = Work::begin();
        std::thread::sleep(Duration::from_millis(100));
        assert!(work.so_far() < Duration::from_millis(50));
        while work.so_far() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
    }
}
