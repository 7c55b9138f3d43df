//! What the MMU does when memslots change or a dirty log is harvested.
//!
//! Slots publish a new table, then wait until every vCPU has passed a checkpoint: from then on
//! nobody can look anything up in the old table, so nobody can install from it. Only then
//! ([`Listener::settled`]) are entries taken away, and every vCPU made to flush once more, because
//! it may have used them meanwhile. Taking them away earlier would leave a hole: a vCPU that found
//! the old slot just before could install its page just after.

use addr::{Gfn, Hfn, Hva, HvaRange, PageSize};
use memory::dirty::{DirtyGfn, DirtyWord};
use memory::pagemap;
use memory::slot::{Change, Listener, Slot, SlotId};

use crate::mmu::{LargePages, Mmu, lock};
use crate::nested::{Frames, SecondLevel, Spare};

impl Listener for Mmu {
    fn settled(&self, change: &Change) {
        match change {
            Change::Deleted { old } | Change::Moved { old, .. } => {
                self.clear_shadow();
                self.forget(old);
            }
            Change::FlagsChanged { old, new } => {
                self.clear_shadow();
                self.relog(old, new);
            }
            Change::Created { .. } | Change::Unchanged => {}
        }
    }

    fn write_protect(&self, slot: &Slot, words: &[DirtyWord]) {
        if let Some(shadow) = &self.shadow {
            shadow.refuse_writes(words.iter().flat_map(|word| host_frames(slot, *word)));
        }
        let Some(second) = self.second.get(slot.id.address_space()) else {
            return;
        };
        let mut spare = Spare::new();
        let changes = lock(&self.changes);
        for word in words {
            let first = slot.base_gfn.number() + word.index as u64 * 64;
            second.protect_word(Gfn::new(first), word.mask, &mut spare);
        }
        drop(changes);
        second.return_spare(&mut spare);
    }
}

impl Mmu {
    /// A slot is gone.
    fn forget(&self, old: &Slot) {
        if let Some(second) = self.second.get(old.id.address_space()) {
            self.change_and_recycle(second, |unlinked| second.zap(frames(old), unlinked));
        }
    }

    /// A slot has other flags: its dirty log begins or ends.
    fn relog(&self, old: &Slot, new: &Slot) {
        let Some(second) = self.second.get(new.id.address_space()) else {
            return;
        };
        match (old.logs_dirty(), new.logs_dirty()) {
            // Nothing is to be noticed before pages are reported, and protected then.
            (false, true) if starts_all_dirty(new) => {}
            (false, true) => {
                let mut spare = Spare::new();
                let changes = lock(&self.changes);
                second.protect(frames(new), &mut spare);
                drop(changes);
                second.return_spare(&mut spare);
                self.flush_vcpus();
            }
            (true, false) => {
                self.change_and_recycle(second, |unlinked| {
                    for frames in self.could_be_large(new) {
                        second.collapse(&frames, unlinked);
                    }
                });
            }
            _ => {}
        }
    }

    /// The frames of a slot that large entries may map.
    fn could_be_large(&self, slot: &Slot) -> Vec<Frames> {
        if self.config.large_pages == LargePages::OfSlot {
            return vec![frames(slot)];
        }
        let bytes = slot.npages << PageSize::Size4K.shift();
        let Some(range) = HvaRange::new(slot.hva, bytes) else {
            return Vec::new();
        };
        let first = slot.hva.frame().number();
        let base = slot.base_gfn.number();
        let frame = |hva: Hva| base + (hva.frame().number() - first);
        let huge = pagemap::huge_ranges(range).into_iter();
        huge.map(|r| frame(r.start())..frame(r.end())).collect()
    }

    /// Shadow tables are made anew after a change of slots, as in kvm.ko.
    pub(crate) fn clear_shadow(&self) {
        if let Some(shadow) = &self.shadow {
            let limbo = shadow.clear();
            self.flush_vcpus();
            shadow.recycle(limbo);
        }
    }

    fn change_and_recycle(
        &self,
        second: &SecondLevel,
        change: impl FnOnce(&mut Vec<crate::nested::TableRef>),
    ) {
        let mut unlinked = Vec::new();
        {
            let _changes = lock(&self.changes);
            change(&mut unlinked);
        }
        self.flush_vcpus();
        second.recycle(unlinked);
    }

    /// Pages of dirty rings: the next write to each must be noticed. The monitor wrote these
    /// numbers: none is trusted.
    pub(crate) fn protect_ring_pages(&self, pages: &[DirtyGfn]) {
        for page in pages {
            let id = SlotId::new(page.slot);
            let slot = self.slots.get(id);
            if let (Some(shadow), Some(slot)) = (&self.shadow, &slot) {
                let gfn = Gfn::new(slot.base_gfn.number().wrapping_add(page.offset));
                shadow.refuse_writes(slot.hva_of(gfn).map(Hva::frame));
            }
            let second = self.second.get(id.address_space());
            if let (Some(second), Some(slot)) = (second, slot)
                && page.offset < slot.npages
            {
                let gfn = Gfn::new(slot.base_gfn.number() + page.offset);
                let mut spare = Spare::new();
                let changes = lock(&self.changes);
                second.protect_word(gfn, 1, &mut spare);
                drop(changes);
                second.return_spare(&mut spare);
            }
        }
    }
}

/// The host frames of one word of a slot's dirty log.
fn host_frames(slot: &Slot, word: DirtyWord) -> impl Iterator<Item = Hfn> {
    let first = slot.hva.frame().number() + word.index as u64 * 64;
    let mut mask = word.mask;
    std::iter::from_fn(move || {
        let bit = (mask != 0).then(|| mask.trailing_zeros())?;
        mask &= mask - 1;
        Some(Hfn::new(first + u64::from(bit)))
    })
}

fn frames(slot: &Slot) -> Frames {
    slot.base_gfn.number()..slot.end_gfn().number()
}

/// Whether the log begins with every page marked (`KVM_DIRTY_LOG_INITIALLY_SET`): then no write
/// needs to be noticed before the first harvest.
fn starts_all_dirty(slot: &Slot) -> bool {
    let Some(bitmap) = &slot.dirty else {
        return false;
    };
    (0..slot.npages).all(|page| bitmap.is_marked(page))
}
