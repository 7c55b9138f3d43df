//! The guest's TSC across vCPUs (`kvm_synchronize_tsc` in `arch/x86/kvm/x86.c`).
//!
//! A monitor restores the TSC of one vCPU after the other, each a little later. Values that are
//! within a second of what the VM's TSC would show now are meant to be the same TSC, so they get the
//! same offset.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Shared, Vm, lock};
use crate::clock::scale::Ratio;
use crate::clock::time::GuestTsc;
use crate::clock::{host_tsc, monotonic_ns};
use crate::errno::Errno;

/// The last write of a TSC, and the offset that vCPUs share.
#[derive(Debug, Default)]
pub(super) struct TscLine {
    last_ns: u64,
    last_value: u64,
    last_khz: u32,
    shared_offset: u64,
    /// The monitor has written a TSC.
    written: bool,
}

impl TscLine {
    /// The offset for a write of `value` (`None`: a new vCPU) when the host's TSC is `host`.
    fn offset(&mut self, value: Option<u64>, khz: u32, host: u64, ns: u64) -> u64 {
        let data = value.unwrap_or(0);
        let near = self.is_near(data, khz, ns);
        self.written |= value.is_some();
        let matched = near && khz == self.last_khz;
        let offset = if matched {
            self.shared_offset
        } else {
            data.wrapping_sub(host)
        };
        self.note(offset, data, khz, ns);
        offset
    }

    fn is_near(&self, data: u64, khz: u32, ns: u64) -> bool {
        if data == 0 {
            return true;
        }
        let elapsed = u128::from(ns - self.last_ns.min(ns)) * u128::from(khz) / 1_000_000;
        let expected = self.last_value.wrapping_add(elapsed as u64);
        let second = u64::from(khz) * 1000;
        self.written
            && data < expected.saturating_add(second)
            && data.saturating_add(second) > expected
    }

    fn note(&mut self, offset: u64, value: u64, khz: u32, ns: u64) {
        self.last_ns = ns;
        self.last_value = value;
        self.last_khz = khz;
        self.shared_offset = offset;
    }
}

impl Shared {
    /// The offset to the host's TSC for a vCPU that is new or whose TSC the monitor writes.
    pub(crate) fn synchronize_tsc(&self, value: Option<u64>, tsc: &GuestTsc) -> u64 {
        lock(&self.tsc).offset(value, tsc.khz(), tsc.scaled_host(), monotonic_ns())
    }

    /// The monitor chose an offset itself.
    pub(crate) fn note_tsc_offset(&self, offset: u64, tsc: &GuestTsc) {
        let value = tsc.scaled_host().wrapping_add(offset);
        let mut line = lock(&self.tsc);
        line.written = true;
        line.note(offset, value, tsc.khz(), monotonic_ns());
    }

    /// The frequency that new vCPUs get.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }
}

impl Vm {
    /// `KVM_GET_TSC_KHZ` on a VM.
    pub fn tsc_khz(&self) -> u32 {
        self.shared.tsc_khz()
    }

    /// `KVM_SET_TSC_KHZ` on a VM, for vCPUs to come.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        let khz = possible_khz(khz)?;
        self.shared.tsc_khz.store(khz, Ordering::Relaxed);
        Ok(())
    }
}

/// The frequency that a monitor asks for, where a guest can have it; 0 is the host's.
pub(crate) fn possible_khz(khz: u32) -> Result<u32, Errno> {
    match khz {
        0 => Ok(host_tsc_khz()),
        khz if khz < Ratio::limit_khz(host_tsc_khz()) => Ok(khz),
        _ => Err(Errno::EINVAL),
    }
}

/// The scaling that gives a guest this frequency. Within 250 parts per million of the host's it is
/// not scaled, as in the kernel.
pub(crate) fn scaling(khz: u32) -> Option<Ratio> {
    let host = host_tsc_khz();
    if khz.abs_diff(host) <= host / 4000 {
        return Some(Ratio::ONE);
    }
    Ratio::of(khz, host)
}

/// How fast the host's TSC runs, in kHz: what the CPU or its hypervisor says, else measured.
pub fn host_tsc_khz() -> u32 {
    static KHZ: OnceLock<u32> = OnceLock::new();
    *KHZ.get_or_init(|| told().unwrap_or_else(measure))
}

/// Leaf 0x15 (SDM 2A, CPUID), or the timing leaf that hypervisors share.
fn told() -> Option<u32> {
    use core::arch::x86_64::__cpuid;
    let basic = __cpuid(0).eax;
    if basic >= 0x15 {
        let ratio = __cpuid(0x15);
        if ratio.eax != 0 && ratio.ebx != 0 && ratio.ecx != 0 {
            let hz = u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax);
            return u32::try_from(hz / 1000).ok();
        }
    }
    let is_guest = __cpuid(1).ecx >> 31 & 1 != 0;
    let timing = 0x4000_0010;
    if is_guest && __cpuid(0x4000_0000).eax >= timing && __cpuid(0x4000_0000).eax < 0x4001_0000 {
        return Some(__cpuid(timing).eax).filter(|khz| *khz > 100_000);
    }
    None
}

fn measure() -> u32 {
    let started = Instant::now();
    let first = host_tsc();
    while started.elapsed() < Duration::from_millis(20) {
        std::hint::spin_loop();
    }
    let cycles = host_tsc() - first;
    let ns = started.elapsed().as_nanos();
    (u128::from(cycles) * 1_000_000 / ns) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 1_000_000;
    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn new_vcpus_share_one_tsc() {
        let mut line = TscLine::default();
        let first = line.offset(None, KHZ, 500, 10);
        assert_eq!(first, 500u64.wrapping_neg());
        assert_eq!(line.offset(None, KHZ, 900, 20), first);
    }

    #[test]
    fn near_writes_share_an_offset_and_far_ones_do_not() {
        let mut line = TscLine::default();
        line.offset(None, KHZ, 0, 0);
        let first = line.offset(Some(100 * SECOND), KHZ, SECOND, SECOND);
        assert_eq!(first, 99 * SECOND);
        let near = line.offset(Some(100 * SECOND), KHZ, SECOND + 1000, SECOND + 1000);
        assert_eq!(near, first);
        let far = line.offset(Some(200 * SECOND), KHZ, 2 * SECOND, 2 * SECOND);
        assert_eq!(far, 198 * SECOND);
    }

    #[test]
    fn the_host_has_a_frequency() {
        assert!((100_000..20_000_000).contains(&host_tsc_khz()));
    }
}
