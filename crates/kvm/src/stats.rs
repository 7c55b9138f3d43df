//! `KVM_GET_STATS_FD`: counters in KVM's binary form (`api.rst`, 4.133).
//!
//! ```text
//!   header | id, 48 bytes | descriptors, 64 bytes each | data, 8 bytes each
//! ```
//!
//! The file is a memfd, one for each object, made at the first call; each call opens it anew. The
//! kernel's file counts while it is read; a memfd holds what was written last. So the values are
//! brought up to date whenever a vCPU leaves `KVM_RUN`, a memslot or a dirty log changes, or
//! somebody asks for a descriptor, and ten times a second from the first call on.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, kvm_stats_header};
use mmu::Mmu;
use mmu::stats::VcpuStats;

use crate::clock::monotonic_ns;
use crate::errno::Errno;
use crate::irqchip::apic::Alarm;
use crate::service::{AlarmHandle, Expire, Service};
use crate::vcpu::Vcpu;
use crate::vm::{Shared, Vm};

/// How old a value that somebody reads may be.
const REFRESH_NS: u64 = 100_000_000;

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

/// Where a file's values come from: numbers that any thread may read.
type Source = Box<dyn Fn() -> Vec<u64> + Send + Sync>;

/// An object's file, once somebody has asked for it.
#[derive(Default)]
pub(crate) struct StatsFile(OnceLock<Arc<Published>>);

struct Published {
    file: File,
    /// Where the values begin.
    data: u64,
    source: Source,
    alarm: AlarmHandle,
}

impl StatsFile {
    /// A descriptor of the program's own, at the beginning of the file.
    fn open(
        &self,
        id: &str,
        stats: &[Stat],
        source: Source,
        service: &Service,
    ) -> Result<OwnedFd, Errno> {
        if self.0.get().is_none() {
            let published = Arc::new(Published {
                file: publish(&encode(id, stats))?,
                data: (HEADER + NAME + stats.len() * DESCRIPTOR) as u64,
                source,
                alarm: service.alarm(),
            });
            let target = Arc::downgrade(&(Arc::clone(&published) as Arc<dyn Expire>));
            published.alarm.set_target(target);
            // Another thread may have been faster; one of the two files is as good as the other.
            let _ = self.0.set(published);
        }
        let published = self.0.get().ok_or(Errno::ENOMEM)?;
        published.expired();
        let path = format!("/proc/self/fd/{}", published.file.as_raw_fd());
        Ok(File::open(path)?.into())
    }

    /// Brings the file up to date, if somebody has it.
    fn refresh(&self) {
        if let Some(published) = self.0.get() {
            // A memfd of ours that has its size takes the write.
            let _ = published.write();
        }
    }
}

impl Expire for Published {
    fn expired(&self) {
        // As above.
        let _ = self.write();
        self.alarm.set(Some(monotonic_ns() + REFRESH_NS));
    }
}

impl Published {
    fn write(&self) -> Result<(), Errno> {
        let values: Vec<u8> = (self.source)()
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
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

fn values(stats: &[Stat]) -> Vec<u64> {
    stats.iter().map(|stat| stat.value).collect()
}

fn of_vm(mmu: &Mmu) -> [Stat; 5] {
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

/// A counter that one thread writes at a time, and any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// One more. The caller has the vCPU's lock.
    pub(crate) fn bump(&self) {
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a vCPU's run loop has met, by the kernel's names.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names are the kernel's")]
pub(crate) struct Counters {
    pub(crate) exits: Count,
    pub(crate) io_exits: Count,
    pub(crate) mmio_exits: Count,
    pub(crate) signal_exits: Count,
    pub(crate) irq_window_exits: Count,
    pub(crate) halt_exits: Count,
    pub(crate) halt_wakeup: Count,
    pub(crate) halt_attempted_poll: Count,
    pub(crate) halt_successful_poll: Count,
    pub(crate) hypercalls: Count,
    pub(crate) irq_injections: Count,
    pub(crate) nmi_injections: Count,
    /// Those of the MMU, from the first run on.
    pub(crate) mmu: OnceLock<Arc<VcpuStats>>,
}

fn of_vcpu(counters: &Counters) -> Vec<Stat> {
    let c = counters;
    let own = [
        counter("exits", c.exits.get()),
        counter("io_exits", c.io_exits.get()),
        counter("mmio_exits", c.mmio_exits.get()),
        counter("signal_exits", c.signal_exits.get()),
        counter("irq_window_exits", c.irq_window_exits.get()),
        counter("halt_exits", c.halt_exits.get()),
        counter("halt_wakeup", c.halt_wakeup.get()),
        counter("halt_attempted_poll", c.halt_attempted_poll.get()),
        counter("halt_successful_poll", c.halt_successful_poll.get()),
        counter("hypercalls", c.hypercalls.get()),
        counter("irq_injections", c.irq_injections.get()),
        counter("nmi_injections", c.nmi_injections.get()),
    ];
    let none = VcpuStats::default();
    let engine = c.mmu.get().map_or(&none, |stats| &**stats).named();
    let engine = engine.into_iter();
    own.into_iter()
        .chain(engine.map(|(name, value)| counter(name, value)))
        .collect()
}

impl Vm {
    /// `KVM_GET_STATS_FD` on a VM.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let shared = self.shared();
        let mmu = Arc::clone(shared.mmu());
        let stats = of_vm(&mmu);
        let source = Box::new(move || values(&of_vm(&mmu)));
        let service = shared.irqchip().service();
        shared.stats().open("kvm", &stats, source, service)
    }
}

impl Shared {
    /// Brings the VM's file up to date, where somebody has it open.
    pub(crate) fn refresh_stats(&self) {
        self.stats().refresh();
    }
}

impl Vcpu {
    /// `KVM_GET_STATS_FD` on a vCPU.
    pub fn stats_fd(&self) -> Result<OwnedFd, Errno> {
        let id = format!("kvm/vcpu-{}", self.id());
        let counters = Arc::clone(self.counters());
        let stats = of_vcpu(&counters);
        let source = Box::new(move || values(&of_vcpu(&counters)));
        let service = self.vm().irqchip().service();
        self.stats().open(&id, &stats, source, service)
    }

    /// Brings the files up to date that somebody has open.
    pub(crate) fn refresh_stats(&self) {
        self.stats().refresh();
        self.vm().refresh_stats();
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
        let (stats, service) = (StatsFile::default(), Service::new().unwrap());
        let count = Arc::new(Count::default());
        let open = || {
            let count = Arc::clone(&count);
            let source = Box::new(move || vec![count.get()]);
            let opened = stats.open("kvm", &[counter("a", 0)], source, &service);
            File::from(opened.unwrap())
        };
        let first = open();
        count.bump();
        let mut second = open();
        let mut text = Vec::new();
        second.read_to_end(&mut text).unwrap();
        assert_eq!(text[text.len() - 8..], 1u64.to_le_bytes());
        let read = || {
            let mut value = [0; 8];
            first
                .read_exact_at(&mut value, text.len() as u64 - 8)
                .unwrap();
            u64::from_le_bytes(value)
        };
        assert_eq!(read(), 1);
        count.bump();
        stats.refresh();
        assert_eq!(read(), 2);
        // And by itself.
        count.bump();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while read() != 3 && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(read(), 3);
    }
}
