//! Our slots, driven by calls, and a naive model of them to compare with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use addr::{Address, Gfn, Hva};
use memory::quiesce::Domain;
use memory::slot::{
    ClearLog, DirtyLogError, ManualProtect, Region, SlotError, Slots, SlotsConfig, USER_SLOTS,
};

use super::calls::{Call, FIRST_FRAME, FRAMES, UNMAPPED};

/// What a call answers: an errno, or the dirty log where it was asked for.
pub(crate) type Answer = Result<Vec<u64>, i32>;

/// Something that has memory slots.
pub(crate) trait Machine {
    fn set_region(&mut self, region: Region) -> Result<(), i32>;
    fn get_log(&mut self, slot: u32) -> Answer;
    fn clear_log(&mut self, slot: u32, first_page: u64, num_pages: u32, word: u64) -> Answer;
    fn touch(&mut self, frame: u64);

    /// Makes a call.
    fn call(&mut self, call: &Call) -> Answer {
        let nothing = |()| Vec::new();
        match *call {
            Call::SetRegion(region) => self.set_region(region).map(nothing),
            Call::GetLog { slot } => self.get_log(slot),
            Call::ClearLog {
                slot,
                first_page,
                num_pages,
                word,
            } => self.clear_log(slot, first_page, num_pages, word),
            Call::Touch { frame } => {
                self.touch(frame);
                Ok(Vec::new())
            }
        }
    }
}

/// Our slots.
pub(crate) struct Ours {
    pub(crate) slots: Arc<Slots>,
}

impl Ours {
    pub(crate) fn new(config: SlotsConfig, manual: ManualProtect) -> Self {
        let slots = Slots::new(Domain::new(), config);
        slots.set_manual_protect(manual);
        Self { slots }
    }
}

impl Machine for Ours {
    fn set_region(&mut self, region: Region) -> Result<(), i32> {
        let result = self.slots.set_region(&region);
        result.map(|_| ()).map_err(SlotError::errno)
    }

    fn get_log(&mut self, slot: u32) -> Answer {
        self.slots.harvest(slot).map_err(DirtyLogError::errno)
    }

    fn clear_log(&mut self, slot: u32, first_page: u64, num_pages: u32, word: u64) -> Answer {
        let bits = vec![word; num_pages.min(1 << 16).div_ceil(64) as usize];
        let clear = ClearLog {
            slot,
            first_page,
            num_pages,
            bitmap: Hva::new(bits.as_ptr() as u64),
        };
        let result = self.slots.clear_dirty_log(&clear);
        result.map(|()| Vec::new()).map_err(DirtyLogError::errno)
    }

    fn touch(&mut self, frame: u64) {
        let table = self.slots.snapshot(0);
        if let Some(slot) = table
            .find(Gfn::new(frame))
            .filter(|s| s.is_writable() && s.hva != UNMAPPED)
        {
            slot.mark_dirty(Gfn::new(frame));
        }
    }
}

/// Slots as a list that is searched from end to end, dirty pages as a set.
pub(crate) struct Model {
    config: SlotsConfig,
    manual: ManualProtect,
    slots: BTreeMap<u32, Region>,
    dirty: BTreeMap<u32, BTreeSet<u64>>,
}

const LOG: u32 = 1;
const READONLY: u32 = 2;
const PAGE: u64 = 4096;

impl Model {
    pub(crate) fn new(config: SlotsConfig, manual: ManualProtect) -> Self {
        Self {
            config,
            manual,
            slots: BTreeMap::new(),
            dirty: BTreeMap::new(),
        }
    }

    /// The slot of address space 0 that holds a frame.
    pub(crate) fn find(&self, frame: u64) -> Option<&Region> {
        let at = frame * PAGE;
        self.slots
            .values()
            .find(|r| r.slot >> 16 == 0 && r.gpa.raw() <= at && at - r.gpa.raw() < r.size)
    }

    fn slot_exists(&self, slot: u32) -> bool {
        (slot >> 16) < self.config.address_spaces as u32 && (slot as u16) < USER_SLOTS
    }

    fn check(&self, r: &Region) -> Result<(), i32> {
        let aligned = [r.gpa.raw(), r.hva.raw(), r.size]
            .iter()
            .all(|n| n % PAGE == 0);
        let in_host = r
            .hva
            .checked_add(r.size)
            .is_some_and(|end| end <= self.config.host_end);
        let in_guest = r.gpa.checked_add(r.size).is_some();
        let small = r.size / PAGE < 1 << 31;
        let known = r.flags & !(LOG | READONLY) == 0;
        let fine = aligned && in_host && in_guest && small && known && self.slot_exists(r.slot);
        if fine { Ok(()) } else { Err(libc::EINVAL) }
    }

    fn check_place(&self, r: &Region) -> Result<(), i32> {
        let end = r.gpa.raw() + r.size;
        let overlaps = self.slots.values().any(|o| {
            o.slot != r.slot
                && o.slot >> 16 == r.slot >> 16
                && o.gpa.raw() < end
                && r.gpa.raw() < o.gpa.raw() + o.size
        });
        if overlaps {
            return Err(libc::EEXIST);
        }
        if end > 1 << self.config.physical_bits {
            return Err(libc::EINVAL);
        }
        Ok(())
    }
}

impl Machine for Model {
    fn set_region(&mut self, r: Region) -> Result<(), i32> {
        self.check(&r)?;
        let old = self.slots.get(&r.slot).copied();
        if r.size == 0 {
            self.dirty.remove(&r.slot);
            return self.slots.remove(&r.slot).map(drop).ok_or(libc::EINVAL);
        }
        if let Some(old) = old {
            let same = old.hva == r.hva && old.size == r.size;
            if !same || (old.flags ^ r.flags) & READONLY != 0 {
                return Err(libc::EINVAL);
            }
        }
        if old.is_none_or(|old| old.gpa != r.gpa) {
            self.check_place(&r)?;
        }
        self.slots.insert(r.slot, r);
        if r.flags & LOG == 0 {
            self.dirty.remove(&r.slot);
        } else if !self.dirty.contains_key(&r.slot) {
            let pages = match self.manual {
                ManualProtect::InitiallySet => r.size / PAGE,
                _ => 0,
            };
            self.dirty.insert(r.slot, (0..pages).collect());
        }
        Ok(())
    }

    fn get_log(&mut self, slot: u32) -> Answer {
        if !self.slot_exists(slot) {
            return Err(libc::EINVAL);
        }
        let pages = self.slots.get(&slot).map_or(0, |r| r.size / PAGE);
        let dirty = self.dirty.get_mut(&slot).ok_or(libc::ENOENT)?;
        let mut words = vec![0; pages.div_ceil(64) as usize];
        for page in &*dirty {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
        if self.manual == ManualProtect::Off {
            dirty.clear();
        }
        Ok(words)
    }

    fn clear_log(&mut self, slot: u32, first: u64, count: u32, word: u64) -> Answer {
        if !self.slot_exists(slot) || !first.is_multiple_of(64) {
            return Err(libc::EINVAL);
        }
        let pages = self.slots.get(&slot).map_or(0, |r| r.size / PAGE);
        let dirty = self.dirty.get_mut(&slot).ok_or(libc::ENOENT)?;
        let count = u64::from(count);
        let inside = first <= pages && count <= pages - first;
        if !inside || (count < pages - first && !count.is_multiple_of(64)) {
            return Err(libc::EINVAL);
        }
        // Whole words are cleared, as far as the slot goes.
        let end = first + count.next_multiple_of(64);
        dirty.retain(|p| *p < first || *p >= end || word >> (p % 64) & 1 == 0);
        Ok(Vec::new())
    }

    fn touch(&mut self, frame: u64) {
        if let Some(r) = self
            .find(frame)
            .copied()
            .filter(|r| r.flags & READONLY == 0 && r.hva != UNMAPPED)
            && let Some(dirty) = self.dirty.get_mut(&r.slot)
        {
            dirty.insert(frame - r.gpa.raw() / PAGE);
        }
    }
}

/// Feeds our slots and the model the same calls until the bytes are used up. Returns how many.
pub(crate) fn compare_with_model(data: &[u8]) -> usize {
    let mut u = arbitrary::Unstructured::new(data);
    let Ok(manual) = super::calls::manual_protect(&mut u) else {
        return 0;
    };
    let config = SlotsConfig::default();
    let mut ours = Ours::new(config, manual);
    let mut model = Model::new(config, manual);
    let slots = Arc::clone(&ours.slots);
    let mut reader = slots.reader(0);
    let mut count = 0;
    while let Ok(call) = super::calls::next(&mut u, Hva::new(0x10_0000_0000)) {
        let (answer, expected) = (ours.call(&call), model.call(&call));
        assert_eq!(answer, expected, "call {count}: {call:?}");
        let frame = FIRST_FRAME + (count as u64 * 37) % FRAMES;
        let expected = model.find(frame).map(|r| (r.slot, r.gpa.raw(), r.hva));
        let seen = |s: &memory::slot::Slot| (s.id.raw(), s.base_gfn.number() * PAGE, s.hva);
        assert_eq!(
            slots.snapshot(0).find(Gfn::new(frame)).map(seen),
            expected,
            "{call:?}"
        );
        assert_eq!(reader.find(Gfn::new(frame)).map(seen), expected, "{call:?}");
        count += 1;
    }
    slots.check_invariants();
    count
}
