//! `KVM_GET_STATS_FD`: counters in KVM's binary form (`api.rst`, 4.133).
//!
//! ```text
//!   header | id, 48 bytes | descriptors, 64 bytes each | data, 8 bytes each
//! ```
//!
//! The descriptor is a sealed memfd with the values of the moment of the call; a program that wants
//! newer ones asks again.

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};

use kvm_bindings::{KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, kvm_stats_header};

use crate::errno::Errno;
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Bytes of a name, and of the id.
const NAME: usize = 48;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16 + NAME;
const HEADER: usize = size_of::<kvm_stats_header>();

/// One counter.
struct Stat {
    name: &'static str,
    flags: u32,
    value: u64,
}

fn counter(name: &'static str, value: u64) -> Stat {
    Stat {
        name,
        flags: KVM_STATS_TYPE_CUMULATIVE,
        value,
    }
}

fn gauge(name: &'static str, value: u64) -> Stat {
    Stat {
        name,
        flags: KVM_STATS_TYPE_INSTANT,
        value,
    }
}

fn padded(name: &str) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    let len = name.len().min(NAME - 1);
    bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
    bytes
}

/// The whole file.
fn encode(id: &str, stats: &[Stat]) -> Vec<u8> {
    let descriptors = HEADER + NAME;
    let data = descriptors + stats.len() * DESCRIPTOR;
    let header = [
        0,
        NAME as u32,
        stats.len() as u32,
        HEADER as u32,
        descriptors as u32,
        data as u32,
    ];
    let mut file: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    file.extend(padded(id));
    for (i, stat) in stats.iter().enumerate() {
        file.extend(stat.flags.to_le_bytes());
        // The exponent 0, and one value.
        file.extend([0, 0, 1, 0]);
        file.extend((8 * i as u32).to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(padded(stat.name));
    }
    file.extend(stats.iter().flat_map(|stat| stat.value.to_le_bytes()));
    file
}

#[expect(unsafe_code, reason = "memfds are the C library's")]
fn publish(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    // SAFETY: a constant name; a descriptor is only taken where it is one.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"kvm-stats".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(Errno::last());
        }
        File::from_raw_fd(fd)
    };
    file.write_all(bytes)?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file.into())
}

impl Vm {
    /// `KVM_GET_STATS_FD` on a VM.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let mmu = self.shared().mmu();
        let [small, medium, large] = mmu.pages();
        let stats = [
            counter("remote_tlb_flush", mmu.stats().remote_tlb_flush.get()),
            counter(
                "remote_tlb_flush_requests",
                mmu.stats().remote_tlb_flush_requests.get(),
            ),
            gauge("pages_4k", small),
            gauge("pages_2m", medium),
            gauge("pages_1g", large),
        ];
        publish(&encode("kvm", &stats))
    }
}

impl Vcpu {
    /// `KVM_GET_STATS_FD` on a vCPU.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let inner = self.lock();
        let counters = inner.core.engine().map(|e| e.mmu().stats().clone());
        let counters = counters.unwrap_or_default();
        let stats = [
            counter("pf_taken", counters.pf_taken.get()),
            counter("pf_fixed", counters.pf_fixed.get()),
            counter("pf_spurious", counters.pf_spurious.get()),
            counter("pf_fast", counters.pf_fast.get()),
            counter("pf_guest", counters.pf_guest.get()),
            counter("pf_emulate", counters.pf_emulate.get()),
            counter("tlb_flush", counters.tlb_flush.get()),
            counter("invlpg", counters.invlpg.get()),
        ];
        publish(&encode(&format!("kvm/vcpu-{}", self.id()), &stats))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offsets_lead_to_the_values() {
        let file = encode("kvm", &[counter("a", 7), gauge("b", 9)]);
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        assert_eq!(&file[word(12)..][..4], b"kvm\0");
        let second = word(16) + DESCRIPTOR;
        assert_eq!(&file[second + 16..][..2], b"b\0");
        let value = word(20) + word(second + 8);
        assert_eq!(file[value..value + 8], 9u64.to_le_bytes());
        assert_eq!(file.len(), value + 8);
    }
}
