//! The shadow path: the guest's tables and the memslots in one, what kvm.ko does without NPT or EPT.
//!
//! A shadow page stands for one table of the guest's. Its entries lead straight to host pages, so
//! that a TLB miss takes one walk instead of two. The price is to keep it in step with the guest's
//! table, which the guest changes by plain stores.
//!
//! # In step
//! A TLB may be stale until the guest invalidates; so may shadow pages, which are but a large TLB.
//!
//! | a guest table is | its shadow pages                 | the guest's stores to it            |
//! |------------------|----------------------------------|-------------------------------------|
//! | protected        | equal it (but for A and D)       | fault, which makes it unsynchronised |
//! | unsynchronised   | may be stale                     | go on unnoticed                     |
//!
//! A table begins unsynchronised. Whatever invalidates compares: `INVLPG` the entries on the way to
//! its address, all else every entry of every unsynchronised table. An entry whose guest entry has
//! changed is dropped. So is what a table's shadow page holds from an earlier life when the table is
//! linked once more: a guest that takes a free page as a table where there was none has nothing to
//! invalidate. A table that stayed as it was for some flushes becomes protected: leaves stop
//! taking writes to it, every vCPU drops its TLB, and it is compared once more. That happens only
//! while the guest flushes, never within a translation, so a TLB never holds a right that a
//! translation has just taken away.
//!
//! Unlike in kvm.ko tables of every level may be unsynchronised, because the architecture lets
//! upper levels be cached, too (paging-structure caches, SDM 3A, 5.10.3).
//!
//! Tables are known by their *host* frame: a store through another memslot that leads to the same
//! memory is noticed as well.
//!
//! # Rights
//! Look-ups check the guest's rights as the walker does, with the same function and the registers of
//! that moment; so CR0.WP, SMEP, SMAP, AC and PKRU need no shadow pages of their own. A look-up that
//! finds nothing, or not enough, walks the guest's tables, sets A and D there, and caches the way.
//!
//! # Readers and writers
//! Look-ups take no lock. All changes are made under one lock, which is never held while waiting for
//! vCPUs.
//!
//! # What it does not see
//! Stores of the host to a guest table (a device that writes to memory) are noticed only at the
//! next flush, and not at all in a protected table. That is so with kvm.ko's shadow pages, too.

mod entry;
mod fault;
mod invariants;
mod lookup;
mod memory;
mod state;
mod sync;

use ::memory::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memory::PageMemory;
use state::{Format, State};

use crate::mmu::lock;
use crate::registers::Regime;
use crate::stats::ShadowStats;

pub(crate) use fault::{Path, Retry};
pub use lookup::ShadowEntry;
pub(crate) use sync::{Flush, Waiting};

/// The shadow tables of one VM.
#[derive(Default)]
pub(crate) struct Shadow {
    state: Mutex<State>,
    /// Grows when all pages are dropped: roots of an older generation are void.
    generation: AtomicU64,
    /// How many tables may differ from the guest's: none is the common case, seen without the lock.
    unsync: AtomicUsize,
    /// How many shadow pages there are.
    pages: AtomicUsize,
    next_vcpu: AtomicU64,
}

/// One vCPU's roots.
pub(crate) struct Roots {
    vcpu: u64,
    generation: u64,
    /// One; in PAE paging one for each PDPTE.
    pages: [Option<PageMemory>; 4],
}

impl Shadow {
    /// Roots of a new vCPU, which has none yet.
    pub(crate) fn new_roots(&self) -> Roots {
        Roots {
            vcpu: self.next_vcpu.fetch_add(1, Ordering::Relaxed),
            generation: 0,
            pages: [None; 4],
        }
    }

    /// Forgets a vCPU.
    pub(crate) fn drop_roots(&self, roots: &mut Roots) {
        lock(&self.state).roots.remove(&roots.vcpu);
        roots.pages = [None; 4];
    }

    /// Pages mapped, by size.
    pub(crate) fn counts(&self) -> [i64; 3] {
        lock(&self.state).counts.get()
    }

    /// Bytes of shadow pages in use.
    pub(crate) fn bytes(&self) -> usize {
        lock(&self.state).arena.bytes_in_use()
    }

    /// Shadow pages, roughly: without the lock.
    pub(crate) fn pages(&self) -> usize {
        self.pages.load(Ordering::Relaxed)
    }

    /// Counters of the VM's statistics.
    pub(crate) fn stats(&self) -> ShadowStats {
        let state = lock(&self.state);
        ShadowStats {
            mmu_cache_miss: state.made,
            mmu_shadow_zapped: state.zapped,
            mmu_pte_write: state.written,
            mmu_unsync: state.unsync.len() as u64,
        }
    }

    /// Publishes what is read without the lock.
    fn publish(&self, state: &State) {
        let compared = state.unsync.len() + state.settling.len();
        self.unsync.store(compared, Ordering::Release);
        self.pages.store(state.by_key.len(), Ordering::Relaxed);
    }
}

/// Which root serves an address.
fn root_index(regime: &Regime, linear: u64) -> usize {
    if regime.mode == x86::paging::PagingMode::Pae {
        (linear >> 30 & 3) as usize
    } else {
        0
    }
}
