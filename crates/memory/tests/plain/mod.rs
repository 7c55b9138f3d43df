//! A table of slots and one slot, as most tests want them.

use std::sync::Arc;

use addr::{Gpa, Hva};
use memory::quiesce::Domain;
use memory::slot::{Region, SlotFlags, Slots, SlotsConfig};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const LOG: u32 = SlotFlags::LOG_DIRTY_PAGES.bits();

pub(crate) fn slots() -> Arc<Slots> {
    Slots::new(Domain::new(), SlotsConfig::default())
}

/// Slot 1, 16 pages at 64 KiB.
pub(crate) fn region() -> Region {
    Region {
        slot: 1,
        flags: 0,
        gpa: Gpa::new(0x1_0000),
        size: 16 * PAGE,
        hva: Hva::new(0x1000_0000),
    }
}
