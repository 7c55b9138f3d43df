//! Keeping in step: what a flush of the guest's does.

use std::sync::atomic::Ordering;

use addr::{Address, Frame, Hfn, Hva};
use memory::access as host;

use super::entry::Entry;
use super::memory::PageMemory;
use super::state::{EntryRef, PageId, Source, State, block_of};
use super::{Format, Roots, Shadow, root_index};
use crate::mmu::{Mmu, lock};
use crate::registers::Regime;

/// Flushes that a table must stay unchanged before it is protected.
const QUIET_FLUSHES: u8 = 3;

/// What waits for the vCPUs to drop their TLBs.
#[derive(Debug)]
pub(crate) struct Settling {
    /// Newly protected tables.
    tables: Vec<Hfn>,
    /// Memory of shadow pages that readers may still hold.
    limbo: Vec<PageMemory>,
}

/// Memory of shadow pages that readers may still hold.
#[must_use = "memory that is not recycled is lost until the end"]
pub(crate) struct Limbo(Vec<PageMemory>);

/// What a flush came to.
#[derive(Debug)]
#[must_use]
pub(crate) enum Flush {
    /// Entries were dropped where the guest had changed its own.
    Compared,
    /// These tables are to be protected: every vCPU must drop its TLB, then [`Shadow::settle`].
    Protecting(Settling),
}

/// Whether this vCPU can wait for the others, which protecting asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    Possible,
    Impossible,
}

impl Shadow {
    /// The guest invalidates everything: compares all unsynchronised tables.
    pub(crate) fn flush(&self, waiting: Waiting) -> Flush {
        if self.unsync.load(Ordering::Acquire) == 0 {
            return Flush::Compared;
        }
        let mut state = lock(&self.state);
        state.compare_settling();
        let mut settled = Vec::new();
        for frame in state.unsync.clone() {
            let changed = state.compare_table(frame);
            let Some(table) = state.tables.get_mut(&frame) else {
                continue;
            };
            table.quiet = if changed == Compared::Changed {
                0
            } else {
                table.quiet.saturating_add(1)
            };
            if table.quiet >= QUIET_FLUSHES {
                settled.push(frame);
            }
            if changed == Compared::Changed {
                state.retire_unused(frame);
            }
        }
        if waiting == Waiting::Impossible || settled.is_empty() {
            state.forget_synchronised();
            self.publish(&state);
            return Flush::Compared;
        }
        for frame in &settled {
            state.protect(*frame);
        }
        state.settling.extend(&settled);
        state.forget_synchronised();
        self.publish(&state);
        Flush::Protecting(Settling {
            tables: settled,
            limbo: state.arena.take_limbo(),
        })
    }

    /// All vCPUs have dropped their TLBs since tables were protected: what the guest wrote until
    /// then is compared once more.
    pub(crate) fn settle(&self, settling: Settling) {
        let mut state = lock(&self.state);
        for frame in settling.tables {
            let _: Compared = state.compare_table(frame);
            // Somebody else may be settling it, too: one entry of the list is ours.
            if let Some(at) = state.settling.iter().position(|f| *f == frame) {
                state.settling.swap_remove(at);
            }
        }
        state.arena.recycle(settling.limbo);
        self.publish(&state);
    }

    /// The guest invalidates one page: compares the entries on the way to it.
    pub(crate) fn flush_page(&self, roots: &Roots, regime: &Regime, linear: u64) {
        if self.unsync.load(Ordering::Acquire) == 0
            || roots.generation != self.generation.load(Ordering::Acquire)
        {
            return;
        }
        let mut state = lock(&self.state);
        let Some(root) = roots.pages[root_index(regime, linear)] else {
            return;
        };
        let mut next = state.by_address.get(&root.address()).copied();
        let mut level = regime.mode.levels();
        while let Some(page) = next {
            let index = regime.index(level, linear);
            let at = EntryRef { page, index };
            let _: Compared = state.compare_entry(at);
            let entry = Entry(state.page(page).memory.entry(index).load(Ordering::Relaxed));
            next = if entry.is_link() {
                state.by_address.get(&entry.address()).copied()
            } else {
                None
            };
            level = level.saturating_sub(1).max(1);
        }
    }

    /// The vCPU's registers changed: finds the roots again that are there already.
    pub(crate) fn find_roots(&self, mmu: &Mmu, roots: &mut Roots, space: usize, regime: &Regime) {
        let mut state = lock(&self.state);
        roots.pages = [None; 4];
        roots.generation = self.generation.load(Ordering::Acquire);
        let slots = mmu.slots().snapshot(space);
        let mut ids = [None; 4];
        for (index, gpa) in regime.tops().into_iter().enumerate() {
            let frame = gpa.and_then(|gpa| {
                let slot = slots.find(gpa.frame())?;
                slot.hva_of(gpa.frame()).map(Hva::frame)
            });
            ids[index] = frame.and_then(|frame| {
                let key = super::state::Key {
                    source: Source::Table(frame),
                    level: regime.mode.levels(),
                    space,
                    format: Format::of(regime),
                };
                state.by_key.get(&key).copied()
            });
        }
        roots.pages = ids.map(|id| id.map(|id| state.page(id).memory));
        state.roots.insert(roots.vcpu, ids);
    }

    /// Writes to these host frames must be noticed again: for a dirty log.
    pub(crate) fn refuse_writes(&self, frames: impl IntoIterator<Item = Hfn>) {
        let mut state = lock(&self.state);
        for frame in frames {
            state.refuse_writes(frame);
        }
    }

    /// Drops everything. The memory is to be recycled after the vCPUs have passed a checkpoint.
    pub(crate) fn clear(&self) -> Limbo {
        let mut state = lock(&self.state);
        state.clear_all();
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.publish(&state);
        Limbo(state.arena.take_limbo())
    }

    /// No reader holds these any more.
    pub(crate) fn recycle(&self, limbo: Limbo) {
        lock(&self.state).arena.recycle(limbo.0);
    }
}

/// Whether a guest table was found changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Same,
    Changed,
}

impl State {
    /// Brings a shadow page in step that is about to be linked once more, and all below it.
    pub(super) fn catch_up(&mut self, page: PageId) {
        let key = self.page(page).key;
        let Source::Table(frame) = key.source else {
            return;
        };
        if key.level == 1 {
            let _: Compared = self.compare_table(frame);
            return;
        }
        // Which tables are below, nobody knows; those that may be stale are few.
        self.compare_settling();
        for frame in self.unsync.clone() {
            let _: Compared = self.compare_table(frame);
        }
    }

    fn compare_settling(&mut self) {
        for frame in self.settling.clone() {
            let _: Compared = self.compare_table(frame);
        }
    }

    /// Drops the entries of a table's shadow pages whose guest entries have changed.
    fn compare_table(&mut self, frame: Hfn) -> Compared {
        let pages = self.tables.get(&frame).map(|t| t.pages.clone());
        let mut result = Compared::Same;
        for page in pages.into_iter().flatten() {
            for index in 0..self.page(page).memory.len() {
                if self.compare_entry(EntryRef { page, index }) == Compared::Changed {
                    result = Compared::Changed;
                }
            }
        }
        result
    }

    fn compare_entry(&mut self, at: EntryRef) -> Compared {
        let page = self.page(at.page);
        let Source::Table(frame) = page.key.source else {
            return Compared::Same;
        };
        let cell = page.memory.entry(at.index);
        if !Entry(cell.load(Ordering::Relaxed)).is_present() {
            return Compared::Same;
        }
        let known = page.memory.guest(at.index).load(Ordering::Relaxed);
        if guest_entry(frame, at.index, page.key.format) == Some(known) {
            return Compared::Same;
        }
        self.clear(at);
        Compared::Changed
    }

    /// Takes tables that are gone or protected off the list of the unsynchronised.
    fn forget_synchronised(&mut self) {
        let tables = &self.tables;
        self.unsync
            .retain(|frame| tables.get(frame).is_some_and(|t| !t.protected));
    }

    /// From now on writes to the table are noticed, as soon as all TLBs are flushed.
    fn protect(&mut self, frame: Hfn) {
        if let Some(table) = self.tables.get_mut(&frame) {
            table.protected = true;
            *self.protected_blocks.entry(block_of(frame)).or_default() += 1;
            self.refuse_writes(frame);
        }
    }

    /// Takes shadow pages of a frame away that nobody uses and that the guest writes to: most likely
    /// it is no table any more.
    fn retire_unused(&mut self, frame: Hfn) {
        let Some(table) = self.tables.get(&frame) else {
            return;
        };
        let (used, unused): (Vec<_>, Vec<_>) = table
            .pages
            .clone()
            .into_iter()
            .partition(|id| self.is_used(*id));
        for id in unused {
            self.retire(id);
        }
        if used.is_empty() {
            self.tables.remove(&frame);
        } else if let Some(table) = self.tables.get_mut(&frame) {
            table.pages = used;
        }
    }

    fn is_used(&self, id: PageId) -> bool {
        self.page(id).links > 0 || self.roots.values().flatten().any(|root| *root == Some(id))
    }
}

/// The guest's entry as it stands in memory, or `None` where the host has none.
pub(super) fn guest_entry(frame: Hfn, index: usize, format: Format) -> Option<u64> {
    let at: Hva = frame
        .start()
        .wrapping_add(index as u64 * format.entry_bytes());
    if format.entry_bytes() == 4 {
        host::load_word::<u32>(at).map(u64::from).ok()
    } else {
        host::load_word::<u64>(at).ok()
    }
}
