//! Counters, with the names of kvm.ko's statistics (`Documentation/virt/kvm/api.rst`, 4.136
//! `KVM_GET_STATS_FD`; the vCPU's and the VM's tables of x86).
//!
//! A vCPU counts in its own [`VcpuStats`], which its thread alone writes: no locked instruction.
//! What belongs to the VM is in [`VmStats`].

use std::cell::Cell;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

/// A counter that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one, in the thread that owns the counter.
    #[inline]
    pub(crate) fn increment(&self) {
        // Not a read-modify-write: there is one writer.
        self.0.store(self.get() + 1, Ordering::Relaxed);
    }
}

/// A counter that any thread writes.
#[derive(Debug, Default)]
pub struct SharedCounter(AtomicU64);

impl SharedCounter {
    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// What one vCPU's translations met.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct VcpuStats {
    /// Translations that the path's tables couldn't answer (direct: all).
    pub pf_taken: Counter,
    /// Those that ended with an entry installed or changed.
    pub pf_fixed: Counter,
    /// Those that found the entry there already: another vCPU was faster.
    pub pf_spurious: Counter,
    /// Those that only made a page writable for its dirty log.
    pub pf_fast: Counter,
    /// Those that the guest gets.
    pub pf_guest: Counter,
    /// Those that left for the monitor: device memory, writes to read-only slots.
    pub pf_emulate: Counter,
    /// Accesses to addresses in no memslot.
    pub pf_mmio_spte_created: Counter,
    /// Invalidations of all translations that the guest asked for.
    pub tlb_flush: Counter,
    /// Invalidations of one page that the guest asked for.
    pub invlpg: Counter,
}

/// What belongs to the whole VM.
#[derive(Debug, Default)]
pub struct VmStats {
    /// Times that all vCPUs were made to drop their TLBs.
    pub remote_tlb_flush: SharedCounter,
    /// Times that somebody wanted that; fewer may have been needed.
    pub remote_tlb_flush_requests: SharedCounter,
    /// Shadow pages taken away because there were too many.
    pub mmu_recycled: SharedCounter,
}

/// What the shadow tables count; all zero on the other paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowStats {
    /// Shadow pages made.
    pub mmu_cache_miss: u64,
    /// Shadow pages taken away.
    pub mmu_shadow_zapped: u64,
    /// Guest stores to protected tables, noticed by their fault.
    pub mmu_pte_write: u64,
    /// Guest tables that are not in step now.
    pub mmu_unsync: u64,
}

const SHARDS: usize = 8;

/// Pages mapped, by level, spread so that vCPUs which fault in parallel don't meet.
#[derive(Debug, Default)]
pub(crate) struct PageCounts {
    shards: [Shard; SHARDS],
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard([AtomicI64; 3]);

impl PageCounts {
    /// Adds to the count of a level (1 to 3).
    #[inline]
    pub(crate) fn add(&self, level: u8, count: i64) {
        self.shards[shard()].0[usize::from(level) - 1].fetch_add(count, Ordering::Relaxed);
    }

    /// The sums: 4 KiB, 2 MiB, 1 GiB.
    pub(crate) fn get(&self) -> [i64; 3] {
        let mut sums = [0; 3];
        for shard in &self.shards {
            for (sum, part) in sums.iter_mut().zip(&shard.0) {
                *sum += part.load(Ordering::Relaxed);
            }
        }
        sums
    }
}

/// The shard of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        }
        mine.get()
    })
}
