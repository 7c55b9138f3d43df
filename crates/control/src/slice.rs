//! Short turns on the processor, for threads that answer and sleep again.
//!
//! vCPUs of a busy guest keep every processor for whole slices of the scheduler, some milliseconds.
//! A thread that asks for a shorter slice has an earlier deadline, and so is run sooner when it
//! wakes; it gets no more of the processor in all. Linux 6.12 and later heed that of ordinary threads
//! (`sched(7)`, `sched_setattr(2)`: `sched_runtime`), earlier ones ignore it.

use std::time::Duration;

/// About what an answer takes.
const SLICE: Duration = Duration::from_micros(200);

/// Asks for short slices for this thread, and for those that it starts. Where the kernel refuses,
/// answers come later and nothing else is lost.
#[expect(unsafe_code, reason = "the C library has no call for it")]
pub(crate) fn ask_for_short_turns() {
    // SAFETY: plain data, for which zeros are valid.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as libc::c_uint;
    // SAFETY: the structure is alive for the calls and as long as they are told; 0 is this thread.
    unsafe {
        // The rest stays as it is: the policy, and a niceness that somebody chose.
        if libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) == 0
            && attributes.sched_policy == libc::SCHED_OTHER as u32
        {
            attributes.sched_runtime = SLICE.as_nanos() as u64;
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
        let after = std::thread::spawn(|| {
            ask_for_short_turns();
            attributes()
        })
        .join()
        .unwrap();
        assert_eq!(after.sched_policy, before.sched_policy);
        assert_eq!(after.sched_nice, before.sched_nice);
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
