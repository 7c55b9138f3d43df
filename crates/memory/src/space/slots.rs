//! Which calls of `KVM_SET_USER_MEMORY_REGION` make memory slots follow the flat view.
//!
//! The calls are data: the layer above makes them on `/dev/kvm` or on [`crate::slot::Slots`].
//! Slots hold whole pages, so what lies in a page only partly is left to MMIO, as QEMU does.

use std::collections::{BTreeMap, BTreeSet};

use addr::{Address, Gpa, Hva, PageSize};

use super::diff::Difference;
use super::flat::FlatRange;
use super::tree::Protection;
use crate::slot::{MAX_PAGES, SlotFlags};

/// One call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotCall {
    /// Which slot.
    pub slot: u32,
    /// Its flags.
    pub flags: SlotFlags,
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Bytes; zero deletes the slot.
    pub size: u64,
    /// Where it lies in the monitor.
    pub hva: Hva,
}

/// There are more pieces of RAM than slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine has only {0} memory slots")]
pub struct SlotsExhausted(pub u32);

/// Gives slots to ranges of RAM.
#[derive(Debug)]
pub struct SlotAssigner {
    limit: u32,
    used: BTreeMap<Gpa, SlotCall>,
    numbers: BTreeSet<u32>,
    always: SlotFlags,
}

impl SlotAssigner {
    /// For a machine with `limit` slots (`KVM_CAP_NR_MEMSLOTS`).
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            used: BTreeMap::new(),
            numbers: BTreeSet::new(),
            always: SlotFlags::empty(),
        }
    }

    /// The slots as they are now, by guest address.
    pub fn slots(&self) -> impl Iterator<Item = &SlotCall> {
        self.used.values()
    }

    /// The calls that follow a change of the view, in the order in which they are to be made.
    ///
    /// On an error nothing is to be called, and the assigner is as it was.
    pub fn follow(&mut self, difference: &Difference) -> Result<Vec<SlotCall>, SlotsExhausted> {
        let mut next = Self {
            limit: self.limit,
            used: self.used.clone(),
            numbers: self.numbers.clone(),
            always: self.always,
        };
        let mut calls = Vec::new();
        for range in &difference.removed {
            next.remove(range, &mut calls);
        }
        for range in &difference.added {
            next.add(range, &mut calls)?;
        }
        *self = next;
        Ok(calls)
    }

    /// The calls that switch dirty logging of all slots.
    pub fn log_dirty(&mut self, logging: SlotFlags) -> Vec<SlotCall> {
        self.always = logging & SlotFlags::LOG_DIRTY_PAGES;
        let always = self.always;
        let calls = self.used.values_mut().map(|call| {
            call.flags.remove(SlotFlags::LOG_DIRTY_PAGES);
            call.flags.insert(always);
            *call
        });
        calls.collect()
    }

    fn remove(&mut self, range: &FlatRange, calls: &mut Vec<SlotCall>) {
        let (from, to) = (range.range.start(), range.range.end());
        let gone: Vec<Gpa> = self.used.range(from..to).map(|(gpa, _)| *gpa).collect();
        for gpa in gone {
            if let Some(call) = self.used.remove(&gpa) {
                self.numbers.remove(&call.slot);
                calls.push(SlotCall { size: 0, ..call });
            }
        }
    }

    fn add(&mut self, range: &FlatRange, calls: &mut Vec<SlotCall>) -> Result<(), SlotsExhausted> {
        let Some((mut gpa, mut hva, mut left)) = whole_pages(range) else {
            return Ok(());
        };
        let mut flags = self.always;
        if range.protection() == Protection::ReadOnly {
            flags.insert(SlotFlags::READONLY);
        }
        while left > 0 {
            let size = left.min(LARGEST);
            let slot = self.free_number()?;
            let call = SlotCall {
                slot,
                flags,
                gpa,
                size,
                hva,
            };
            self.numbers.insert(slot);
            self.used.insert(gpa, call);
            calls.push(call);
            gpa = gpa.wrapping_add(size);
            hva = hva.wrapping_add(size);
            left -= size;
        }
        Ok(())
    }

    fn free_number(&self) -> Result<u32, SlotsExhausted> {
        let taken = self
            .numbers
            .iter()
            .zip(0..)
            .take_while(|(n, i)| *n == i)
            .count() as u32;
        if taken < self.limit {
            Ok(taken)
        } else {
            Err(SlotsExhausted(self.limit))
        }
    }
}

/// The largest slot that keeps the next one aligned for 1 GiB pages.
const LARGEST: u64 = (MAX_PAGES * PageSize::Size4K.bytes()) & !PageSize::Size1G.offset_mask();

/// The whole pages of a range of RAM: where they begin, and how many bytes they are.
fn whole_pages(range: &FlatRange) -> Option<(Gpa, Hva, u64)> {
    let page = PageSize::Size4K;
    let (start, hva) = (range.range.start(), range.hva()?);
    let skipped = start.raw().wrapping_neg() & page.offset_mask();
    let len = range.range.len().checked_sub(skipped)? & !page.offset_mask();
    let hva = hva.checked_add(skipped)?;
    // Where the guest's page would not be the host's page, no slot can show it.
    (len > 0 && hva.is_aligned(page)).then(|| (start.wrapping_add(skipped), hva, len))
}
