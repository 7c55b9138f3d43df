//! Makes a vCPU leave when it has run for too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cpu::VcpuKick;
use memory::quiesce::Requests;

/// How often it looks.
const TICK: Duration = Duration::from_millis(25);

/// A thread that looks at one vCPU until this is dropped.
pub struct Watchdog {
    /// Odd while the vCPU runs; grows at each entry and exit.
    runs: Arc<AtomicU64>,
    kick: Arc<VcpuKick>,
}

impl Watchdog {
    /// Kicks a vCPU that has been in one run for `ticks` looks.
    pub fn new(kick: Arc<VcpuKick>, ticks: u32) -> Self {
        let runs = Arc::new(AtomicU64::new(0));
        let seen = Arc::downgrade(&runs);
        let target = Arc::clone(&kick);
        std::thread::spawn(move || {
            let (mut last, mut count) = (0, 0);
            while let Some(runs) = seen.upgrade() {
                let now = runs.load(Ordering::Relaxed);
                count = if now == last && now % 2 == 1 {
                    count + 1
                } else {
                    0
                };
                last = now;
                if count >= ticks {
                    target.request(Requests::EXIT);
                }
                drop(runs);
                std::thread::sleep(TICK);
            }
        });
        Self { runs, kick }
    }

    /// The vCPU is about to run.
    pub fn start(&self) {
        self.kick.withdraw(Requests::EXIT);
        self.runs.fetch_add(1, Ordering::Relaxed);
    }

    /// The vCPU has left.
    pub fn stop(&self) {
        self.runs.fetch_add(1, Ordering::Relaxed);
    }
}
