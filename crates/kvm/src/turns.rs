//! How long a thread's turns on the processor are to be.
//!
//! Linux's scheduler runs the thread whose slice ends first, and a thread that wakes with a shorter
//! slice than that of the one that runs takes its place at once (`sched(7)`, `sched_setattr(2)`:
//! `sched_runtime`; Linux 6.12 and later heed it of ordinary threads, earlier ones ignore it). Nobody
//! gets more of the processor in all. So:
//!
//! - A vCPU, which computes for as long as it is let, asks for [`Turns::Long`] ones: the monitor's
//!   threads that bring its interrupts and its data, and those that only want to say a word and sleep
//!   again, don't wait for the next tick of the host's clock. A vCPU itself waits no longer for
//!   another: the tick ends slices, and comes no more often than this.
//! - A thread that answers and sleeps again asks for [`Turns::Short`] ones.
//!
//! A thread hands its wish on to the threads that it starts, as it does its niceness.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turns {
    /// About what an answer takes.
    Short,
    /// A tick of most hosts, and longer than what they give to everybody.
    Long,
}

impl Turns {
    /// What the call takes.
    fn slice(self) -> Duration {
        match self {
            Self::Short => Duration::from_micros(200),
            Self::Long => Duration::from_millis(4),
        }
    }
}

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// No more calls to the scheduler in this process: for one that forbids itself system calls, and may
/// die of ours.
pub fn forbid() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// Asks for such turns for this thread, and for those that it starts. Where the kernel refuses, others
/// wait longer and nothing else is lost.
#[expect(unsafe_code, reason = "the C library has no call for it")]
pub fn ask_for(turns: Turns) {
    if FORBIDDEN.load(Ordering::Relaxed) {
        return;
    }
    // SAFETY: plain data, for which zeros are valid.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: the structure is alive for the calls and as long as they are told; 0 is this thread.
    unsafe {
        // The rest stays as it is: the policy, and a niceness that somebody chose.
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0
            && attributes.sched_policy == libc::SCHED_OTHER as u32
        {
            attributes.sched_runtime = turns.slice().as_nanos() as u64;
            libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_and_the_niceness_stay() {
        let before = std::thread::spawn(attributes).join().unwrap();
        for turns in [Turns::Short, Turns::Long] {
            let asked = move || {
                ask_for(turns);
                attributes()
            };
            let after = std::thread::spawn(asked).join().unwrap();
            assert_eq!(after.sched_policy, before.sched_policy);
            assert_eq!(after.sched_nice, before.sched_nice);
        }
    }

    #[expect(unsafe_code, reason = "as above")]
    fn attributes() -> libc::sched_attr {
        let size = size_of::<libc::sched_attr>() as libc::c_uint;
        // SAFETY: as above.
        unsafe {
            let mut attributes: libc::sched_attr = std::mem::zeroed();
            let asked = libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0);
            assert_eq!(asked, 0);
            attributes
        }
    }
}
