//! `KVM_GET_STATS_FD`: counters in KVM's binary form (`api.rst`, 4.133).
//!
//! ```text
//!   header | id, 48 bytes | descriptors, 64 bytes each | data, 8 bytes each
//! ```
//!
//! The file is a memfd, one for each object, made at the first call; each call opens it anew. Its
//! values are brought up to date whenever a vCPU leaves `KVM_RUN` or somebody asks for a descriptor:
//! what a program reads while all its vCPUs run is as old as the last exit.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use kvm_bindings::{KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, kvm_stats_header};

use crate::errno::Errno;
use crate::vcpu::{Inner, Vcpu};
use crate::vm::{Shared, Vm};

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

/// An object's file, once somebody has asked for it.
#[derive(Default)]
pub(crate) struct StatsFile(OnceLock<Published>);

struct Published {
    file: File,
    /// Where the values begin.
    data: u64,
}

impl StatsFile {
    /// A descriptor of the program's own, at the beginning of the file.
    fn open(&self, id: &str, stats: &[Stat]) -> Result<OwnedFd, Errno> {
        if self.0.get().is_none() {
            let file = publish(&encode(id, stats))?;
            let data = (HEADER + NAME + stats.len() * DESCRIPTOR) as u64;
            // Another thread may have been faster; one of the two files is as good as the other.
            let _ = self.0.set(Published { file, data });
        }
        let published = self.0.get().ok_or(Errno::ENOMEM)?;
        published.write(stats)?;
        let path = format!("/proc/self/fd/{}", published.file.as_raw_fd());
        Ok(File::open(path)?.into())
    }

    /// Whether anybody reads it.
    fn is_open(&self) -> bool {
        self.0.get().is_some()
    }

    fn refresh(&self, stats: &[Stat]) {
        if let Some(published) = self.0.get() {
            // A memfd of ours that has its size takes the write.
            let _ = published.write(stats);
        }
    }
}

impl Published {
    fn write(&self, stats: &[Stat]) -> Result<(), Errno> {
        let values: Vec<u8> = stats.iter().flat_map(|s| s.value.to_le_bytes()).collect();
        Ok(self.file.write_all_at(&values, self.data)?)
    }
}

#[expect(unsafe_code, reason = "memfds are the C library's")]
fn publish(bytes: &[u8]) -> Result<File, Errno> {
    // SAFETY: a constant name; a descriptor is only taken where it is one.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"kvm-stats".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(Errno::last());
        }
        File::from_raw_fd(fd)
    };
    file.write_all(bytes)?;
    Ok(file)
}

fn of_vm(shared: &Shared) -> [Stat; 5] {
    let mmu = shared.mmu();
    let [small, medium, large] = mmu.pages();
    [
        counter("remote_tlb_flush", mmu.stats().remote_tlb_flush.get()),
        counter(
            "remote_tlb_flush_requests",
            mmu.stats().remote_tlb_flush_requests.get(),
        ),
        gauge("pages_4k", small),
        gauge("pages_2m", medium),
        gauge("pages_1g", large),
    ]
}

fn of_vcpu(inner: &Inner) -> Vec<Stat> {
    let counters = inner.core.engine().map(|e| e.mmu().stats().clone());
    let named = counters.unwrap_or_default().named().into_iter();
    named.map(|(name, value)| counter(name, value)).collect()
}

impl Vm {
    /// `KVM_GET_STATS_FD` on a VM.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let shared = self.shared();
        shared.stats().open("kvm", &of_vm(shared))
    }
}

impl Vcpu {
    /// `KVM_GET_STATS_FD` on a vCPU.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let inner = self.lock();
        let id = format!("kvm/vcpu-{}", self.id());
        self.stats().open(&id, &of_vcpu(&inner))
    }

    /// Brings the files up to date that somebody has open.
    pub(crate) fn refresh_stats(&self, inner: &Inner) {
        if self.stats().is_open() {
            self.stats().refresh(&of_vcpu(inner));
        }
        if self.vm().stats().is_open() {
            self.vm().stats().refresh(&of_vm(self.vm()));
        }
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

    #[test]
    fn a_file_follows_its_object() {
        use std::io::Read;
        let stats = StatsFile::default();
        let first: File = stats.open("kvm", &[counter("a", 7)]).unwrap().into();
        let mut second: File = stats.open("kvm", &[counter("a", 8)]).unwrap().into();
        stats.refresh(&[counter("a", 9)]);
        let mut text = Vec::new();
        second.read_to_end(&mut text).unwrap();
        assert_eq!(text[text.len() - 8..], 9u64.to_le_bytes());
        let mut value = [0; 8];
        first
            .read_exact_at(&mut value, text.len() as u64 - 8)
            .unwrap();
        assert_eq!(value, 9u64.to_le_bytes());
    }
}
