//! `KVM_SET_USER_MEMORY_REGION`.

use std::collections::HashMap;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, PoisonError, Weak};

use crate::sync::{Mutex, MutexGuard};

use addr::{Address, Gfn, Gpa, Hva, PageSize};
use arc_swap::{ArcSwap, Guard};

use super::log::ManualProtect;
use super::table::{Reader, Table};
use super::{Listener, MAX_PAGES, OutOfMemory, Slot, SlotFlags, SlotId, USER_SLOTS};
use crate::access;
use crate::dirty::DirtyBitmap;
use crate::quiesce::{Domain, Requests};

/// `struct kvm_userspace_memory_region`, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Address space in the high half, number in the low.
    pub slot: u32,
    /// See [`SlotFlags`].
    pub flags: u32,
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Bytes; zero deletes the slot.
    pub size: u64,
    /// Where it lies in the monitor.
    pub hva: Hva,
}

/// What a call of [`Slots::set_region`] did.
#[derive(Clone, Debug)]
pub enum Change {
    /// There is a new slot.
    Created {
        /// The slot.
        new: Slot,
    },
    /// A slot is gone.
    Deleted {
        /// The slot as it was.
        old: Slot,
    },
    /// A slot has another guest address, perhaps other flags, too.
    Moved {
        /// The slot as it was.
        old: Slot,
        /// The slot as it is.
        new: Slot,
    },
    /// A slot has other flags.
    FlagsChanged {
        /// The slot as it was.
        old: Slot,
        /// The slot as it is.
        new: Slot,
    },
    /// The slot was so already.
    Unchanged,
}

impl Change {
    /// The slot as it was before.
    pub fn old(&self) -> Option<&Slot> {
        match self {
            Self::Deleted { old } | Self::Moved { old, .. } | Self::FlagsChanged { old, .. } => {
                Some(old)
            }
            Self::Created { .. } | Self::Unchanged => None,
        }
    }

    /// The slot as it is now.
    pub fn new_slot(&self) -> Option<&Slot> {
        match self {
            Self::Created { new } | Self::Moved { new, .. } | Self::FlagsChanged { new, .. } => {
                Some(new)
            }
            Self::Deleted { .. } | Self::Unchanged => None,
        }
    }
}

/// Why a region is refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Flags that do not exist here.
    #[error("slot {slot:#x}: unknown flags {flags:#x}")]
    Flags {
        /// The slot's number.
        slot: u32,
        /// All flags.
        flags: u32,
    },
    /// An address or the size is not a multiple of 4 KiB.
    #[error("slot {slot:#x}: {size:#x} bytes at {gpa}, host {hva}: not whole pages")]
    Unaligned {
        /// The slot's number.
        slot: u32,
        /// The guest's address.
        gpa: Gpa,
        /// The host's address.
        hva: Hva,
        /// Bytes.
        size: u64,
    },
    /// The host's range leaves the address space of a process.
    #[error("slot {slot:#x}: {size:#x} bytes at host {hva} are no addresses of a process")]
    HostRange {
        /// The slot's number.
        slot: u32,
        /// The host's address.
        hva: Hva,
        /// Bytes.
        size: u64,
    },
    /// No such slot number or address space.
    #[error("there is no slot {slot:#x}")]
    NoSuchSlot {
        /// The slot's number.
        slot: u32,
    },
    /// The guest's range wraps around, lies beyond what the guest can address, or is too large.
    #[error("slot {slot:#x}: {size:#x} bytes at guest {gpa} are too many or too high")]
    GuestRange {
        /// The slot's number.
        slot: u32,
        /// The guest's address.
        gpa: Gpa,
        /// Bytes.
        size: u64,
    },
    /// A slot that does not exist can't be deleted.
    #[error("slot {slot:#x} does not exist and can't be deleted")]
    NothingToDelete {
        /// The slot's number.
        slot: u32,
    },
    /// A slot's size, host address and `READONLY` can't change.
    #[error("slot {slot:#x} exists with another size, host address or read-only flag")]
    Immutable {
        /// The slot's number.
        slot: u32,
    },
    /// Another slot is there.
    #[error("slot {slot:#x} would overlap {with:?}")]
    Overlap {
        /// The slot's number.
        slot: u32,
        /// A slot that it would overlap.
        with: SlotId,
    },
    /// No memory for the dirty bitmap, or for what a listener needs.
    #[error("slot {slot:#x}: out of memory")]
    OutOfMemory {
        /// The slot's number.
        slot: u32,
    },
}

impl SlotError {
    /// What the kernel answers.
    pub fn errno(self) -> i32 {
        match self {
            Self::Overlap { .. } => libc::EEXIST,
            Self::OutOfMemory { .. } => libc::ENOMEM,
            _ => libc::EINVAL,
        }
    }
}

/// What differs between machines and hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotsConfig {
    /// Two where the guest has system management mode (`KVM_CAP_MULTI_ADDRESS_SPACE`), else one.
    pub address_spaces: usize,
    /// How many bits a guest physical address has.
    pub physical_bits: u32,
    /// The first address behind the monitor's (the kernel's `TASK_SIZE_MAX`).
    pub host_end: Hva,
}

impl Default for SlotsConfig {
    fn default() -> Self {
        Self {
            address_spaces: 2,
            physical_bits: 52,
            // 47 bits less a guard page: the host uses four levels.
            host_end: Hva::new(0x7fff_ffff_f000),
        }
    }
}

/// The memory slots of one virtual machine.
pub struct Slots {
    config: SlotsConfig,
    tables: Box<[ArcSwap<Table>]>,
    domain: Arc<Domain>,
    writer: Mutex<Writer>,
    /// A [`ManualProtect`]; outside the lock, so that listeners can ask.
    pub(super) manual_protect: AtomicU8,
}

/// What only writers use.
#[derive(Default)]
pub(super) struct Writer {
    /// Where each slot begins.
    bases: HashMap<SlotId, Gfn>,
    generation: u64,
    listeners: Vec<Weak<dyn Listener>>,
    /// The size of every vCPU's ring in bytes, where rings are used instead of bitmaps.
    pub(super) ring_bytes: Option<u64>,
}

impl Writer {
    pub(super) fn next_generation(&self) -> u64 {
        self.generation + 1
    }

    pub(super) fn for_each_listener(&self, mut f: impl FnMut(&dyn Listener)) {
        for listener in self.listeners.iter().filter_map(Weak::upgrade) {
            f(&*listener);
        }
    }
}

impl Slots {
    /// No slots. Participants of `domain` are those that may read them.
    pub fn new(domain: Arc<Domain>, config: SlotsConfig) -> Arc<Self> {
        access::install();
        Arc::new(Self {
            config,
            tables: (0..config.address_spaces)
                .map(|_| ArcSwap::default())
                .collect(),
            domain,
            writer: Mutex::default(),
            manual_protect: AtomicU8::default(),
        })
    }

    /// Who reads these slots.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// What it was made with.
    pub fn config(&self) -> &SlotsConfig {
        &self.config
    }

    /// The present table of an address space. Holding it keeps the table, not the memory: see
    /// [`crate::quiesce`] for how long a vCPU may use what it says.
    ///
    /// An address space that does not exist has no slots; it reads as space 0's, as the kernel
    /// masks the index.
    #[inline]
    pub fn snapshot(&self, address_space: usize) -> Guard<Arc<Table>> {
        self.table(address_space).load()
    }

    /// A reader for one thread, faster than [`Slots::snapshot`] where it is used again and again.
    pub fn reader(self: &Arc<Self>, address_space: usize) -> Reader {
        Reader::new(Arc::clone(self), address_space)
    }

    pub(super) fn table(&self, address_space: usize) -> &ArcSwap<Table> {
        &self.tables[if address_space < self.tables.len() {
            address_space
        } else {
            0
        }]
    }

    /// A slot by its name.
    pub fn get(&self, id: SlotId) -> Option<Slot> {
        self.slot_of(&self.lock(), id)
    }

    /// Adds a listener; it is told until it is dropped.
    pub fn listen(&self, listener: Weak<dyn Listener>) {
        let mut writer = self.lock();
        writer.listeners.retain(|l| l.strong_count() > 0);
        writer.listeners.push(listener);
    }

    /// Creates, deletes, moves a slot or changes its flags.
    ///
    /// When it returns no vCPU can reach memory that the slots no longer name.
    pub fn set_region(&self, region: &Region) -> Result<Change, SlotError> {
        self.check(region)?;
        let mut writer = self.lock();
        let id = SlotId::new(region.slot);
        let old = self.slot_of(&writer, id);
        let change = self.plan(&writer, region, old)?;
        if !matches!(change, Change::Unchanged) {
            self.commit(&mut writer, id, &change)?;
        }
        Ok(change)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn slot_of(&self, writer: &Writer, id: SlotId) -> Option<Slot> {
        let base = writer.bases.get(&id)?;
        self.tables[id.address_space()].load().find(*base).cloned()
    }

    pub(super) fn has_slot_number(&self, id: SlotId) -> bool {
        id.address_space() < self.config.address_spaces && id.number() < USER_SLOTS
    }

    /// The checks that need no table.
    pub(super) fn check(&self, region: &Region) -> Result<(), SlotError> {
        let Region {
            slot,
            flags,
            gpa,
            size,
            hva,
        } = *region;
        if SlotFlags::from_bits(flags).is_none() {
            return Err(SlotError::Flags { slot, flags });
        }
        if !self.has_slot_number(SlotId::new(slot)) {
            return Err(SlotError::NoSuchSlot { slot });
        }
        let page = PageSize::Size4K;
        if !gpa.is_aligned(page) || !hva.is_aligned(page) || size & page.offset_mask() != 0 {
            return Err(SlotError::Unaligned {
                slot,
                gpa,
                hva,
                size,
            });
        }
        if hva
            .checked_add(size)
            .is_none_or(|end| end > self.config.host_end)
        {
            return Err(SlotError::HostRange { slot, hva, size });
        }
        if gpa.checked_add(size).is_none() || size >> page.shift() > MAX_PAGES {
            return Err(SlotError::GuestRange { slot, gpa, size });
        }
        Ok(())
    }

    /// What the region asks for, given what is there.
    fn plan(
        &self,
        writer: &Writer,
        region: &Region,
        old: Option<Slot>,
    ) -> Result<Change, SlotError> {
        let slot = region.slot;
        let Some(new) = Slot::from_region(region) else {
            return match old {
                Some(old) => Ok(Change::Deleted { old }),
                None => Err(SlotError::NothingToDelete { slot }),
            };
        };
        let Some(old) = old else {
            self.check_place(&new, region)?;
            let new = self.with_log(writer, new, None)?;
            return Ok(Change::Created { new });
        };
        let readonly_changes = (old.flags ^ new.flags).contains(SlotFlags::READONLY);
        if old.hva != new.hva || old.npages != new.npages || readonly_changes {
            return Err(SlotError::Immutable { slot });
        }
        if old.base_gfn != new.base_gfn {
            self.check_place(&new, region)?;
            let new = self.with_log(writer, new, Some(&old))?;
            Ok(Change::Moved { old, new })
        } else if old.flags != new.flags {
            let new = self.with_log(writer, new, Some(&old))?;
            Ok(Change::FlagsChanged { old, new })
        } else {
            Ok(Change::Unchanged)
        }
    }

    /// Whether a new or moved slot may stand there.
    fn check_place(&self, new: &Slot, region: &Region) -> Result<(), SlotError> {
        let table = self.tables[new.id.address_space()].load();
        let with = table
            .overlapping(new.base_gfn, new.end_gfn())
            .map(|s| s.id)
            .find(|id| *id != new.id);
        if let Some(with) = with {
            return Err(SlotError::Overlap {
                slot: region.slot,
                with,
            });
        }
        let frames = 1 << (self.config.physical_bits - PageSize::Size4K.shift());
        if new.end_gfn().number() > frames {
            let Region {
                slot, gpa, size, ..
            } = *region;
            return Err(SlotError::GuestRange { slot, gpa, size });
        }
        Ok(())
    }

    /// Gives the slot its dirty bitmap: the old one where there was one.
    pub(super) fn with_log(
        &self,
        writer: &Writer,
        mut new: Slot,
        old: Option<&Slot>,
    ) -> Result<Slot, SlotError> {
        if !new.logs_dirty() || writer.ring_bytes.is_some() {
            return Ok(new);
        }
        new.dirty = old.and_then(|o| o.dirty.clone());
        if new.dirty.is_none() {
            let slot = new.id.raw();
            let bitmap =
                DirtyBitmap::new(new.npages).map_err(|_| SlotError::OutOfMemory { slot })?;
            if self.manual_protect() == ManualProtect::InitiallySet {
                bitmap.mark_all();
            }
            new.dirty = Some(Arc::new(bitmap));
        }
        Ok(new)
    }

    fn commit(&self, writer: &mut Writer, id: SlotId, change: &Change) -> Result<(), SlotError> {
        prepare(writer, change).map_err(|OutOfMemory| SlotError::OutOfMemory { slot: id.raw() })?;
        let place = &self.tables[id.address_space()];
        let mut table = place.load().with_generation(writer.next_generation());
        if let Some(old) = change.old() {
            table.remove(old.base_gfn);
        }
        if let Some(new) = change.new_slot() {
            table.insert(new.clone());
        }
        let changes = std::slice::from_ref(change);
        self.publish(writer, id.address_space(), table, changes);
        Ok(())
    }

    /// A table that is the present one after these changes becomes the present one.
    pub(super) fn publish(
        &self,
        writer: &mut Writer,
        address_space: usize,
        table: Table,
        changes: &[Change],
    ) {
        writer.generation = table.generation();
        for old in changes.iter().filter_map(Change::old) {
            writer.bases.remove(&old.id);
        }
        for new in changes.iter().filter_map(Change::new_slot) {
            writer.bases.insert(new.id, new.base_gfn);
        }
        self.tables[address_space].store(Arc::new(table));
        writer.for_each_listener(|l| changes.iter().for_each(|c| l.published(c)));
        self.flush();
        writer.for_each_listener(|l| changes.iter().for_each(|c| l.settled(c)));
    }

    /// Waits until no vCPU uses a translation from before.
    pub(super) fn flush(&self) {
        let nobody = self.domain.request_and_wait(Requests::FLUSH_TLB, None);
        debug_assert!(nobody.is_empty(), "we are no participant");
    }

    /// Panics where the tables contradict themselves or the names. For tests.
    pub fn check_invariants(&self) {
        let writer = self.lock();
        let tables: Vec<_> = self.tables.iter().map(ArcSwap::load).collect();
        let len: usize = tables.iter().map(|t| t.len()).sum();
        assert_eq!(
            len,
            writer.bases.len(),
            "a slot without a name, or a name without a slot"
        );
        for table in &tables {
            table.check_invariants();
        }
        for (id, base) in &writer.bases {
            let found = tables[id.address_space()]
                .find(*base)
                .map(|s| (s.id, s.base_gfn));
            assert_eq!(found, Some((*id, *base)));
        }
    }
}

pub(super) fn prepare(writer: &Writer, change: &Change) -> Result<(), OutOfMemory> {
    let mut result = Ok(());
    writer.for_each_listener(|l| result = result.and_then(|()| l.prepare(change)));
    result
}

impl Slot {
    /// The slot that a checked region describes; `None` for one of no pages.
    pub(super) fn from_region(region: &Region) -> Option<Self> {
        let npages = region.size >> PageSize::Size4K.shift();
        (npages != 0).then(|| Self {
            id: SlotId::new(region.slot),
            flags: SlotFlags::from_bits_truncate(region.flags),
            base_gfn: region.gpa.frame(),
            npages,
            hva: region.hva,
            dirty: None,
        })
    }
}
