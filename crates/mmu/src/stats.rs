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
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts so many, in the thread that owns the counter.
    #[inline]
    pub fn add(&self, count: u64) {
        // Not a read-modify-write: there is one writer.
        self.0.store(self.get() + count, Ordering::Relaxed);
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
    /// Translations that the CPU asked for: its TLB had none.
    pub tlb_fill: Counter,
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
    /// What the CPU on top of the MMU counts.
    pub engine: EngineStats,
}

/// What a CPU that translates guest code counts: why its translated code left, and what was
/// translated. All zero where another CPU sits on the MMU.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Blocks translated.
    pub blocks: Counter,
    /// Instructions in them.
    pub instructions: Counter,
    /// Blocks whose code was changed.
    pub blocks_void: Counter,
    /// Times that the code cache was full.
    pub cache_full: Counter,
    /// An access that the inline TLB does not know, or that no entry may stand for.
    pub exit_access: Counter,
    /// Several accesses under one check that failed.
    pub exit_span: Counter,
    /// A loop that came to the end of what it knows of its operands.
    pub exit_loop: Counter,
    /// A segment that must be checked.
    pub exit_segment: Counter,
    /// A direct jump that was not chained.
    pub exit_link: Counter,
    /// An indirect jump to a target that no table knows.
    pub exit_indirect: Counter,
    /// A block whose page must be looked up again.
    pub exit_stale: Counter,
    /// Somebody asked for attention.
    pub exit_poll: Counter,
    /// A system instruction.
    pub exit_system: Counter,
    /// Another instruction that is run in Rust.
    pub exit_rust: Counter,
    /// An exception that the code raised.
    pub exit_raise: Counter,
    /// The end of an instruction that ran on copies of its operands.
    pub exit_commit: Counter,
    /// A trap of the host.
    pub exit_trap: Counter,
}

impl EngineStats {
    fn named(&self) -> [(&'static str, u64); 17] {
        [
            ("tb_blocks", self.blocks.get()),
            ("tb_instructions", self.instructions.get()),
            ("tb_blocks_void", self.blocks_void.get()),
            ("tb_cache_full", self.cache_full.get()),
            ("tb_exit_access", self.exit_access.get()),
            ("tb_exit_span", self.exit_span.get()),
            ("tb_exit_loop", self.exit_loop.get()),
            ("tb_exit_segment", self.exit_segment.get()),
            ("tb_exit_link", self.exit_link.get()),
            ("tb_exit_indirect", self.exit_indirect.get()),
            ("tb_exit_stale", self.exit_stale.get()),
            ("tb_exit_poll", self.exit_poll.get()),
            ("tb_exit_system", self.exit_system.get()),
            ("tb_exit_rust", self.exit_rust.get()),
            ("tb_exit_raise", self.exit_raise.get()),
            ("tb_exit_commit", self.exit_commit.get()),
            ("tb_exit_trap", self.exit_trap.get()),
        ]
    }
}

impl VcpuStats {
    /// All counters by name: kvm.ko's, and those of the engine as `tb_…`.
    pub fn named(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("tlb_fill", self.tlb_fill.get()),
            ("pf_taken", self.pf_taken.get()),
            ("pf_fixed", self.pf_fixed.get()),
            ("pf_spurious", self.pf_spurious.get()),
            ("pf_fast", self.pf_fast.get()),
            ("pf_guest", self.pf_guest.get()),
            ("pf_emulate", self.pf_emulate.get()),
            ("pf_mmio_spte_created", self.pf_mmio_spte_created.get()),
            ("tlb_flush", self.tlb_flush.get()),
            ("invlpg", self.invlpg.get()),
        ];
        all.extend(self.engine.named());
        all
    }
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
