//! KVM's memory slots: which guest frame lies at which host virtual address.
//!
//! A slot says: these guest frames are those pages of the monitor's address space
//! (`KVM_SET_USER_MEMORY_REGION`). It is the second of the four steps from a guest's address to the
//! host's page. [`Slots`] holds those of one virtual machine and follows `virt/kvm/kvm_main.c`,
//! errno for errno.
//!
//! ```text
//!   set_region ──► Slots ──publish──► Table (immutable, sorted by guest frame)
//!                    │                  ▲ snapshot(), no lock
//!                    │ Listener         │
//!                    ▼                  │
//!                   MMU             vCPU threads, devices
//! ```
//!
//! # A change is synchronous
//! 1. The request is checked against the present table. An error changes nothing.
//! 2. Listeners prepare ([`Listener::prepare`]; may refuse for want of memory).
//! 3. The new table is published.
//! 4. Listeners drop what they derived from the old one ([`Listener::published`]). Whoever installs
//!    something later must see the new generation, or not install it.
//! 5. Every vCPU passes a checkpoint and flushes its TLB ([`crate::quiesce`]).
//! 6. Nobody can reach the old memory: [`Listener::settled`], and the call returns.
//!
//! # Locks
//! One mutex per [`Slots`] orders the writers; it is held during all six steps. A participant never
//! takes it while inside guest mode (the writer waits for it to leave). Readers take none.

mod frames;
mod log;
mod region;
mod replace;
mod table;

use std::fmt;
use std::sync::Arc;

use addr::{Address, Frame, Gfn, Gpa, GpaRange, Hva, PageSize};

use crate::dirty::{DirtyBitmap, DirtyWord};

pub use frames::{FrameSet, Inside};
pub use log::{ClearLog, DirtyLogError, ManualProtect};
pub use region::{Change, Region, SlotError, Slots, SlotsConfig};
pub use table::{Reader, Table};

/// How many slots a monitor may use, per address space (`KVM_CAP_NR_MEMSLOTS`): the kernel's
/// `SHRT_MAX` less three of its own.
pub const USER_SLOTS: u16 = 32764;
/// The largest slot, in pages.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

bitflags::bitflags! {
    /// The flags of `struct kvm_userspace_memory_region`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SlotFlags: u32 {
        /// Remember which pages are written.
        const LOG_DIRTY_PAGES = 1 << 0;
        /// The guest's writes leave as MMIO.
        const READONLY = 1 << 1;
    }
}

/// The name of a slot: address space in the high half, number in the low.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u32);

impl SlotId {
    /// From the field of KVM's structures.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// As KVM's structures hold it.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The address space (0; 1 is that of system management mode).
    pub const fn address_space(self) -> usize {
        (self.0 >> 16) as usize
    }

    /// The number within the address space.
    pub const fn number(self) -> u16 {
        self.0 as u16
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}:{}", self.address_space(), self.number())
    }
}

/// One memory slot.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name.
    pub id: SlotId,
    /// Its flags.
    pub flags: SlotFlags,
    /// The first guest frame.
    pub base_gfn: Gfn,
    /// How many pages; never zero.
    pub npages: u64,
    /// Where the first page lies in the monitor; page-aligned.
    pub hva: Hva,
    /// The dirty bitmap, where the slot logs and the machine does not use rings instead.
    pub dirty: Option<Arc<DirtyBitmap>>,
}

impl Slot {
    /// The first guest frame behind it.
    pub fn end_gfn(&self) -> Gfn {
        Gfn::new(self.base_gfn.number() + self.npages)
    }

    /// The guest physical addresses that it covers.
    pub fn range(&self) -> GpaRange {
        let bytes = self.npages << PageSize::Size4K.shift();
        GpaRange::new(self.base_gfn.start(), bytes)
            .expect("a slot does not wrap: set_region checks")
    }

    /// The page of the slot that is this frame, or `None` outside.
    #[inline]
    pub fn page_of(&self, gfn: Gfn) -> Option<u64> {
        gfn.number()
            .checked_sub(self.base_gfn.number())
            .filter(|page| *page < self.npages)
    }

    /// Where the frame lies in the monitor, or `None` outside.
    #[inline]
    pub fn hva_of(&self, gfn: Gfn) -> Option<Hva> {
        self.page_of(gfn)
            .map(|page| self.hva.wrapping_add(page << PageSize::Size4K.shift()))
    }

    /// Where the byte lies in the monitor, or `None` outside.
    #[inline]
    pub fn hva_at(&self, gpa: Gpa) -> Option<Hva> {
        self.hva_of(gpa.frame())
            .map(|hva| hva.wrapping_add(gpa.page_offset(PageSize::Size4K)))
    }

    /// Whether the guest may write.
    #[inline]
    pub fn is_writable(&self) -> bool {
        !self.flags.contains(SlotFlags::READONLY)
    }

    /// Whether writes must be noticed, for a bitmap or for rings.
    #[inline]
    pub fn logs_dirty(&self) -> bool {
        self.flags.contains(SlotFlags::LOG_DIRTY_PAGES)
    }

    /// Marks a frame in the bitmap, where there is one. Returns whether it was clean before.
    #[inline]
    pub fn mark_dirty(&self, gfn: Gfn) -> bool {
        match (&self.dirty, self.page_of(gfn)) {
            (Some(bitmap), Some(page)) => bitmap.mark(page),
            _ => false,
        }
    }
}

/// Who derives something from slots: the MMU, a listener of a tool.
///
/// All methods run in the thread that changes slots, with the writers' lock held: of [`Slots`] they
/// may use [`Slots::snapshot`], [`Slots::manual_protect`] and what never changes, nothing else.
pub trait Listener: Send + Sync {
    /// A change is about to be published. May refuse it, before anything has changed.
    fn prepare(&self, _change: &Change) -> Result<(), OutOfMemory> {
        Ok(())
    }

    /// A new table has been published; readers of the old one still run. Drop what was derived from
    /// the old one, and let nobody install anything derived from a snapshot of an older generation.
    fn published(&self, _change: &Change) {}

    /// Every vCPU has passed a checkpoint since.
    fn settled(&self, _change: &Change) {}

    /// These pages were reported as dirty: the next write to each must be noticed again. The TLBs
    /// are flushed afterwards.
    fn write_protect(&self, _slot: &Slot, _words: &[DirtyWord]) {}
}

/// A listener has no memory for what it must prepare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;
