//! kvmclock: the time as KVM tells it to a guest (`Documentation/virt/kvm/x86/msr.rst`, and
//! api.rst, 4.29 and 4.30).
//!
//! A VM's clock starts at 0 with the VM. It is kept as one pair, *the host's TSC was T when the
//! clock was N*, and every vCPU's page is computed from that pair with the vCPU's own TSC, so the
//! clocks of all vCPUs agree to the nanosecond (`PVCLOCK_TSC_STABLE_BIT`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use addr::Gpa;
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, kvm_clock_data};

use crate::errno::Errno;

use super::memory::{GuestMemory, NoMemory, at, read_u64, versioned};
use super::scale::PvScale;
use super::time::{GuestTsc, boot_based_raw_ns, host_tsc, realtime_ns};

const NS: u64 = 1_000_000_000;
const TSC_STABLE: u8 = 1 << 0;
const GUEST_STOPPED: u8 = 1 << 1;
const VALID_FLAGS: u32 = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;

/// One moment on the host: its TSC, and the raw monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    tsc: u64,
    ns: u64,
}

impl Pair {
    /// Reads both as close together as the host lets us.
    fn now() -> Pair {
        let read = || {
            let before = host_tsc();
            let ns = boot_based_raw_ns();
            let after = host_tsc();
            (
                after.wrapping_sub(before),
                Pair {
                    tsc: before.midpoint(after),
                    ns,
                },
            )
        };
        let reads = [read(), read(), read()];
        let [best, ..] = reads;
        reads
            .into_iter()
            .fold(best, |a, b| if b.0 < a.0 { b } else { a })
            .1
    }
}

#[derive(Debug)]
struct State {
    base: Pair,
    /// What the clock is ahead of the raw monotonic clock, modulo 2^64.
    offset: u64,
}

/// A VM's clock.
#[derive(Debug)]
pub struct KvmClock {
    to_ns: PvScale,
    state: Mutex<State>,
}

/// `struct pvclock_vcpu_time_info` without its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "pvclock's names")]
pub struct TimeInfo {
    pub tsc_timestamp: u64,
    pub system_time: u64,
    pub scale: PvScale,
    pub flags: u8,
}

const INFO_VERSION: u64 = 0;
const INFO_BODY: u64 = 8;
const INFO_FLAGS: u64 = 29;

impl TimeInfo {
    /// The 24 bytes behind the version and its padding.
    fn bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.system_time.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.scale.multiplier.to_le_bytes());
        bytes[20] = self.scale.shift as u8;
        bytes[21] = self.flags;
        bytes
    }

    /// The time when the guest's TSC is `tsc`.
    pub fn at(&self, tsc: u64) -> u64 {
        self.system_time
            .wrapping_add(self.scale.apply(tsc.wrapping_sub(self.tsc_timestamp)))
    }
}

impl KvmClock {
    /// A clock that starts at 0 now, on a host whose TSC runs at `host_khz`.
    pub fn new(host_khz: u32) -> KvmClock {
        let base = Pair::now();
        KvmClock {
            to_ns: PvScale::between(u64::from(host_khz) * 1000, NS),
            state: Mutex::new(State {
                base,
                offset: base.ns.wrapping_neg(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at_host_tsc(&self, state: &State, tsc: u64) -> u64 {
        let elapsed = self.to_ns.apply(tsc.wrapping_sub(state.base.tsc));
        state
            .base
            .ns
            .wrapping_add(state.offset)
            .wrapping_add(elapsed)
    }

    /// The clock now, in nanoseconds.
    pub fn now(&self) -> u64 {
        self.at_host_tsc(&self.lock(), host_tsc())
    }

    /// `KVM_GET_CLOCK`.
    pub fn get(&self) -> kvm_clock_data {
        let state = self.lock();
        let (realtime, tsc) = (realtime_ns(), host_tsc());
        kvm_clock_data {
            clock: self.at_host_tsc(&state, tsc),
            flags: VALID_FLAGS,
            realtime,
            host_tsc: tsc,
            ..kvm_clock_data::default()
        }
    }

    /// `KVM_SET_CLOCK`. With `KVM_CLOCK_REALTIME`, the clock goes on by what has passed since.
    /// The vCPUs' pages must be written anew.
    pub fn set(&self, data: &kvm_clock_data) -> Result<(), Errno> {
        if data.flags & !VALID_FLAGS != 0 {
            return Err(Errno::EINVAL);
        }
        let mut state = self.lock();
        state.base = Pair::now();
        let passed = if data.flags & KVM_CLOCK_REALTIME != 0 {
            realtime_ns().saturating_sub(data.realtime)
        } else {
            0
        };
        state.offset = data.clock.wrapping_add(passed).wrapping_sub(state.base.ns);
        Ok(())
    }

    /// What a vCPU's page says.
    pub fn info(&self, tsc: &GuestTsc) -> TimeInfo {
        let state = self.lock();
        TimeInfo {
            tsc_timestamp: tsc.at(state.base.tsc),
            system_time: state.base.ns.wrapping_add(state.offset),
            scale: PvScale::between(u64::from(tsc.khz().max(1)) * 1000, NS),
            flags: TSC_STABLE,
        }
    }

    /// Writes a vCPU's page (`MSR_KVM_SYSTEM_TIME`).
    ///
    /// The flag that the guest was stopped stays until the guest clears it.
    pub fn write_page(
        &self,
        memory: &dyn GuestMemory,
        page: Gpa,
        tsc: &GuestTsc,
        pause: Pause,
    ) -> Result<(), NoMemory> {
        let mut info = self.info(tsc);
        let mut old = [0];
        memory.read(at(page, INFO_FLAGS), &mut old)?;
        info.flags |= old[0] & GUEST_STOPPED;
        if pause == Pause::Happened {
            info.flags |= GUEST_STOPPED;
        }
        versioned(memory, at(page, INFO_VERSION), || {
            memory.write(at(page, INFO_BODY), &info.bytes())
        })
    }

    /// Writes the time of day at which the clock was 0 (`MSR_KVM_WALL_CLOCK`).
    pub fn write_wall_clock(&self, memory: &dyn GuestMemory, page: Gpa) -> Result<(), NoMemory> {
        let epoch = realtime_ns().saturating_sub(self.now());
        let (seconds, ns) = ((epoch / NS) as u32, (epoch % NS) as u32);
        versioned(memory, page, || {
            memory.write(at(page, 4), &seconds.to_le_bytes())?;
            memory.write(at(page, 8), &ns.to_le_bytes())
        })
    }

    /// `KVM_HC_CLOCK_PAIRING`: the time of day and the guest's TSC at one moment.
    pub fn write_pairing(
        &self,
        memory: &dyn GuestMemory,
        page: Gpa,
        tsc: &GuestTsc,
    ) -> Result<(), NoMemory> {
        let (time, host) = (realtime_ns(), host_tsc());
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&(time / NS).to_le_bytes());
        bytes[8..16].copy_from_slice(&(time % NS).to_le_bytes());
        bytes[16..24].copy_from_slice(&tsc.at(host).to_le_bytes());
        memory.write(page, &bytes)
    }
}

/// Whether the guest must be told that it was stopped (`KVM_KVMCLOCK_CTRL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It was.
    Happened,
    /// Nothing to tell.
    None,
}

/// Adds to a guest's stolen time (`MSR_KVM_STEAL_TIME`), and tells it that it runs.
pub fn add_steal(memory: &dyn GuestMemory, page: Gpa, ns: u64) -> Result<(), NoMemory> {
    const VERSION: u64 = 8;
    const PREEMPTED: u64 = 16;
    memory.write(at(page, PREEMPTED), &[0])?;
    versioned(memory, at(page, VERSION), || {
        let steal = read_u64(memory, page)?.wrapping_add(ns);
        memory.write(page, &steal.to_le_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::{BASE, Page};
    use super::*;

    const KHZ: u32 = 2_000_000;

    #[test]
    fn it_starts_at_zero_and_can_be_set() {
        let clock = KvmClock::new(KHZ);
        assert!(clock.now() < 60 * NS);
        let data = kvm_clock_data {
            clock: 1 << 50,
            ..Default::default()
        };
        clock.set(&data).unwrap();
        assert!(clock.now().wrapping_sub(1 << 50) < 60 * NS);
        let read = clock.get();
        assert_eq!(read.flags, VALID_FLAGS);
        assert!(read.clock >= 1 << 50);
        let odd = kvm_clock_data {
            flags: 1,
            ..Default::default()
        };
        assert_eq!(clock.set(&odd), Err(Errno::EINVAL));
    }

    #[test]
    fn a_clock_that_slept_catches_up() {
        let clock = KvmClock::new(KHZ);
        let data = kvm_clock_data {
            clock: 5,
            flags: KVM_CLOCK_REALTIME,
            realtime: realtime_ns() - 3600 * NS,
            ..Default::default()
        };
        clock.set(&data).unwrap();
        assert!((3600 * NS..3660 * NS).contains(&clock.now()));
    }

    #[test]
    fn vcpus_with_different_tscs_agree() {
        let clock = KvmClock::new(KHZ);
        let (a, b) = (GuestTsc::new(KHZ), GuestTsc::new(KHZ));
        b.set_offset(1 << 40);
        let host = host_tsc();
        let times = [&a, &b].map(|tsc| clock.info(tsc).at(tsc.at(host)));
        assert_eq!(times[0], times[1]);
    }

    #[test]
    fn the_page_is_odd_while_it_changes_and_keeps_the_stopped_flag() {
        let (clock, page) = (KvmClock::new(KHZ), Page::default());
        let tsc = GuestTsc::new(KHZ);
        clock
            .write_page(&page, BASE, &tsc, Pause::Happened)
            .unwrap();
        assert_eq!(*page.versions.borrow(), [1, 1, 2]);
        assert_eq!(
            page.bytes.borrow()[INFO_FLAGS as usize],
            TSC_STABLE | GUEST_STOPPED
        );
        clock.write_page(&page, BASE, &tsc, Pause::None).unwrap();
        assert_eq!(
            page.bytes.borrow()[INFO_FLAGS as usize],
            TSC_STABLE | GUEST_STOPPED
        );
        assert_eq!(page.versions.borrow().last(), Some(&4));
        let beyond = Gpa::new(0x1010);
        assert!(clock.write_page(&page, beyond, &tsc, Pause::None).is_err());
    }

    #[test]
    fn the_wall_clock_says_when_the_clock_was_zero() {
        let (clock, page) = (KvmClock::new(KHZ), Page::default());
        page.bytes.borrow_mut()[0] = 7;
        clock.write_wall_clock(&page, BASE).unwrap();
        let bytes = page.bytes.borrow();
        let word = |i: usize| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap());
        assert_eq!(word(0), 10, "an odd version is rounded up first");
        assert!(u64::from(word(1)).abs_diff(realtime_ns() / NS) <= 60);
    }

    #[test]
    fn stolen_time_adds_up() {
        let page = Page::default();
        add_steal(&page, BASE, 5).unwrap();
        add_steal(&page, BASE, 6).unwrap();
        assert_eq!(
            page.bytes.borrow()[..12],
            [11, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]
        );
    }
}
