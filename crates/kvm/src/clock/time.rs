//! The host's clocks, and one vCPU's view of them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::scale::Ratio;

/// One moment, on both of a vCPU's time lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// The host's monotonic clock, in nanoseconds.
    pub ns: u64,
    /// The guest's TSC.
    pub tsc: u64,
    /// The guest's TSC frequency in kHz; 0 where it is not known.
    pub tsc_khz: u32,
}

impl Now {
    /// `ns` nanoseconds as cycles of the guest's TSC.
    pub fn cycles(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// When the guest's TSC reaches `deadline`, on the monotonic clock; the present where it
    /// already has.
    pub fn when_tsc_reaches(&self, deadline: u64) -> u64 {
        let cycles = deadline.saturating_sub(self.tsc);
        let ns = u128::from(cycles) * 1_000_000 / u128::from(self.tsc_khz.max(1));
        self.ns
            .saturating_add(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

/// Where the time comes from. Tests bring their own.
pub trait TimeSource: Send + Sync {
    /// The present.
    fn now(&self) -> Now;
}

/// A vCPU's TSC: the host's, scaled, plus an offset (SDM 3C, 26.3).
#[derive(Debug)]
pub struct GuestTsc {
    offset: AtomicU64,
    ratio: AtomicU64,
    khz: AtomicU32,
}

impl GuestTsc {
    /// A TSC that is the host's.
    pub fn new(khz: u32) -> GuestTsc {
        GuestTsc {
            offset: AtomicU64::new(0),
            ratio: AtomicU64::new(Ratio::ONE.0),
            khz: AtomicU32::new(khz),
        }
    }

    /// What the guest's TSC is ahead of the scaled host's, modulo 2^64.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// Sets [`Self::offset`].
    pub fn set_offset(&self, offset: u64) {
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// The scaling ratio.
    pub fn ratio(&self) -> Ratio {
        Ratio(self.ratio.load(Ordering::Relaxed))
    }

    /// Sets the scaling ratio.
    pub fn set_ratio(&self, ratio: Ratio) {
        self.ratio.store(ratio.0, Ordering::Relaxed);
    }

    /// The guest's frequency in kHz.
    pub fn khz(&self) -> u32 {
        self.khz.load(Ordering::Relaxed)
    }

    /// Sets the guest's frequency.
    pub fn set_khz(&self, khz: u32) {
        self.khz.store(khz, Ordering::Relaxed);
    }

    /// The guest's TSC at the moment when the host's was `host`.
    pub fn at(&self, host: u64) -> u64 {
        self.ratio().scale(host).wrapping_add(self.offset())
    }

    /// The host's TSC, scaled.
    pub fn scaled_host(&self) -> u64 {
        self.ratio().scale(host_tsc())
    }

    /// The guest's TSC now.
    pub fn read(&self) -> u64 {
        self.at(host_tsc())
    }
}

impl TimeSource for GuestTsc {
    fn now(&self) -> Now {
        Now {
            ns: monotonic_ns(),
            tsc: self.read(),
            tsc_khz: self.khz(),
        }
    }
}

/// The host's TSC.
#[expect(unsafe_code, reason = "an intrinsic")]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 CPU, and reads no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The host's monotonic clock in nanoseconds: the time line of host timers and of kvmclock.
pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// The monotonic clock without NTP's slewing: kvmclock's base.
pub fn boot_based_raw_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC_RAW)
}

/// Nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME)
}

#[expect(unsafe_code, reason = "clock_gettime(2)")]
fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is ours and live; the clocks named above exist, so it is filled.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_in_nanoseconds() {
        let now = Now {
            ns: 1000,
            tsc: 5_000_000,
            tsc_khz: 2_000_000,
        };
        assert_eq!(now.when_tsc_reaches(5_002_000), 2000);
        assert_eq!(now.when_tsc_reaches(4_000_000), 1000);
        assert_eq!(now.cycles(1_000_000), 2_000_000);
        // Two centuries ahead: far, not wrapped around to near.
        assert!(now.when_tsc_reaches(u64::MAX) > 1 << 62);
    }

    #[test]
    fn the_guest_tsc_is_scaled_then_offset() {
        let tsc = GuestTsc::new(1_000_000);
        tsc.set_ratio(Ratio::of(1_000_000, 2_000_000).unwrap());
        tsc.set_offset(7u64.wrapping_neg());
        assert_eq!(tsc.at(1_000_000), 499_993);
    }
}
