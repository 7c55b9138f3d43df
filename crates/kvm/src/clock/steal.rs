//! How long a vCPU's thread waited for a CPU: the guest's stolen time.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::time::monotonic_ns;

/// The run delay of the thread that made it, from `/proc/thread-self/schedstat`.
#[derive(Debug)]
pub struct StealMeter {
    file: Option<File>,
    last: u64,
    next_look: u64,
}

impl StealMeter {
    /// Starts at 0 for the calling thread. Where the host keeps no such account, nothing is stolen.
    pub fn new() -> StealMeter {
        let file = File::open("/proc/thread-self/schedstat").ok();
        let mut meter = StealMeter {
            file,
            last: 0,
            next_look: 0,
        };
        meter.last = meter.read().unwrap_or(0);
        meter
    }

    fn read(&self) -> Option<u64> {
        let mut text = [0; 64];
        let read = self.file.as_ref()?.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..read]).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse().ok()
    }

    /// Nanoseconds since the last call that gave some. Looks ten times a millisecond at most: the
    /// account lives in a file.
    pub fn take(&mut self) -> u64 {
        let now = monotonic_ns();
        if now < self.next_look {
            return 0;
        }
        self.next_look = now + 100_000;
        let Some(total) = self.read() else { return 0 };
        total.saturating_sub(std::mem::replace(&mut self.last, total))
    }
}

impl Default for StealMeter {
    fn default() -> StealMeter {
        StealMeter::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_only_grows_and_is_taken_once() {
        let mut meter = StealMeter::new();
        meter.take();
        let a_moment = meter.take();
        assert!(a_moment < 10_000_000_000, "{a_moment}");
    }
}
