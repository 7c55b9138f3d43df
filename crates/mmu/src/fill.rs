//! From a guest physical address to the host's page: the nested and the direct path.
//!
//! One [`Fill`] serves one translation. It is the walker's memory, too: on the nested path the
//! guest's page tables are themselves reached through the second level, which makes the walk
//! two-dimensional.
//!
//! # The dirty log
//! A page of a logged slot is mapped by a 4 KiB entry that lets writes fault. A write fault first
//! lets writes through the entry, then marks the page. Not the other way round: a harvest takes the
//! marks first and lets writes fault second, so of the two orders only this one leaves no page
//! writable and unmarked.
//!
//! | fault         | harvest          | afterwards                                  |
//! |---------------|------------------|---------------------------------------------|
//! | allow, mark   | take, protect    | in this harvest, protected                  |
//! | allow         | take             |                                             |
//! | mark          | protect          | in the next harvest, protected              |
//! |               | take, protect    |                                             |
//! | allow, mark   |                  | in the next harvest, writable               |
//!
//! A write that goes through before the mark is set is made by a vCPU that has not passed its
//! checkpoint; whoever harvests last has stopped all vCPUs and finds the mark.

use std::time::Instant;

use addr::{Address, Frame, Gfn, Gpa, Gva, Hva, PageSize};
use memory::access as host;
use memory::dirty::{DirtyGfn, Pushed};
use memory::pagemap;
use memory::slot::{self, Slot};

use crate::access::{Access, AccessKind, Fault, HostFault};
use crate::event::{Cause, FaultEvent, Installed};
use crate::mmu::{LargePages, Mmu, PagingPath, SharedRing, lock};
use crate::nested::{Install, Outcome, SecondLevel, Spare, Writes, size_of};
use crate::stats::VcpuStats;
use crate::walker::{GuestPhysical, PteFault, PteUpdate, PteWidth};

/// A host page that serves a guest physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostPage {
    /// The byte asked for.
    pub(crate) hva: Hva,
    /// The largest aligned guest physical page for which the answer holds.
    pub(crate) size: PageSize,
    /// Whether writes may go on without asking.
    pub(crate) writable: bool,
}

/// One translation in progress.
pub(crate) struct Fill<'a> {
    pub(crate) mmu: &'a Mmu,
    pub(crate) space: usize,
    /// The second level of this address space, on the nested path.
    pub(crate) second: Option<&'a SecondLevel>,
    pub(crate) spare: &'a mut Spare,
    pub(crate) stats: &'a VcpuStats,
    /// This vCPU's view of the memslots.
    pub(crate) slots: &'a mut slot::Reader,
    pub(crate) ring: Option<&'a SharedRing>,
    pub(crate) vcpu: u32,
    pub(crate) rip: u64,
    pub(crate) gva: Gva,
    pub(crate) access: Access,
    /// When it began, where somebody watches.
    pub(crate) started: Option<Instant>,
}

impl Fill<'_> {
    /// The host page at `gpa` for this kind of access; fills the second level.
    #[inline]
    pub(crate) fn host_page(&mut self, gpa: Gpa, kind: AccessKind) -> Result<HostPage, Fault> {
        match self.second {
            Some(second) => self.nested_page(second, gpa, kind),
            None => self.slot_page(gpa, kind),
        }
    }

    #[inline]
    fn nested_page(
        &mut self,
        second: &SecondLevel,
        gpa: Gpa,
        kind: AccessKind,
    ) -> Result<HostPage, Fault> {
        match second.lookup(gpa.frame()) {
            Some(mapped) if kind != AccessKind::Write || mapped.writes == Writes::Allowed => {
                Ok(HostPage {
                    hva: in_page(mapped.frame.start(), gpa),
                    size: size_of(mapped.level),
                    writable: mapped.writes == Writes::Allowed,
                })
            }
            _ => self.nested_fault(second, gpa, kind),
        }
    }

    /// The second level has no entry that allows the access: slot, host address, entry.
    #[inline(never)]
    fn nested_fault(
        &mut self,
        second: &SecondLevel,
        gpa: Gpa,
        kind: AccessKind,
    ) -> Result<HostPage, Fault> {
        self.stats.pf_taken.increment();
        let gfn = gpa.frame();
        let slot = found(self.slots, self.stats, gpa, kind)?;
        let level = match self.mmu.config.large_pages {
            LargePages::OfSlot => largest_level(slot, gfn),
            LargePages::OfHost => host_level(second, slot, gfn, kind),
        };
        let what = plan(slot, gfn, kind, level);
        let Some((mapped, outcome)) = second.install(gfn, what, self.spare) else {
            // Beyond the second level's reach.
            return Ok(page_of(slot, self.ring, gpa, kind));
        };
        if kind == AccessKind::Write && slot.logs_dirty() {
            mark_dirty(slot, self.ring, gfn);
        }
        let page = HostPage {
            hva: in_page(mapped.frame.start(), gpa),
            size: size_of(mapped.level),
            writable: mapped.writes == Writes::Allowed,
        };
        let cause = match outcome {
            Outcome::New => {
                self.stats.pf_fixed.increment();
                Cause::NotPresent
            }
            Outcome::Raised => {
                self.stats.pf_fast.increment();
                Cause::WriteProtected
            }
            Outcome::Found => {
                self.stats.pf_spurious.increment();
                Cause::Spurious
            }
        };
        self.tell_installed(cause, gpa, &page);
        Ok(page)
    }

    /// The direct path: the slot says it all.
    #[inline]
    pub(crate) fn slot_page(&mut self, gpa: Gpa, kind: AccessKind) -> Result<HostPage, Fault> {
        let slot = found(self.slots, self.stats, gpa, kind)?;
        Ok(page_of(slot, self.ring, gpa, kind))
    }

    pub(crate) fn tell_installed(&self, cause: Cause, gpa: Gpa, page: &HostPage) {
        let installed = Installed {
            size: page.size,
            writable: page.writable,
        };
        self.tell(cause, Some(gpa), Some(page.hva), Some(installed));
    }

    /// One branch where nobody watches.
    #[inline]
    pub(crate) fn tell(
        &self,
        cause: Cause,
        gpa: Option<Gpa>,
        hva: Option<Hva>,
        installed: Option<Installed>,
    ) {
        if let Some(started) = self.started {
            let nanoseconds = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.mmu.tell(&FaultEvent {
                vcpu: self.vcpu,
                path: self.mmu.path(),
                cause,
                access: self.access,
                rip: self.rip,
                gva: self.gva,
                gpa,
                hva,
                installed,
                nanoseconds,
            });
        }
    }

    /// A guest page table that the second level does not map yet (or that is found otherwise).
    fn read_fault(&mut self, gpa: Gpa) -> Result<Hva, PteFault> {
        match self.table_page(gpa, AccessKind::Read) {
            Ok(page) => Ok(page.hva),
            Err(_) => Err(PteFault::NotMemory),
        }
    }

    /// A guest page table at `gpa`.
    fn table_page(&mut self, gpa: Gpa, kind: AccessKind) -> Result<HostPage, TableFault> {
        self.host_page(gpa, kind).map_err(|fault| match fault {
            Fault::ReadOnly { .. } => TableFault::ReadOnly,
            _ => TableFault::NotMemory,
        })
    }
}

enum TableFault {
    NotMemory,
    ReadOnly,
}

impl GuestPhysical for Fill<'_> {
    #[inline]
    fn read_pte(&mut self, gpa: Gpa, width: PteWidth) -> Result<u64, PteFault> {
        let known = self.second.and_then(|s| s.frame_of(gpa.frame()));
        let hva = match known {
            Some(frame) => in_page(frame.start(), gpa),
            None => self.read_fault(gpa)?,
        };
        match width {
            PteWidth::Four => host::load_word::<u32>(hva).map(u64::from),
            PteWidth::Eight => host::load_word::<u64>(hva),
        }
        .map_err(|fault| {
            PteFault::Host(HostFault {
                gpa,
                hva: fault.hva,
            })
        })
    }

    fn cmpxchg_pte(
        &mut self,
        gpa: Gpa,
        width: PteWidth,
        current: u64,
        new: u64,
    ) -> Result<PteUpdate, PteFault> {
        let page = match self.table_page(gpa, AccessKind::Write) {
            Ok(page) => page,
            Err(TableFault::ReadOnly) => return Ok(PteUpdate::ReadOnly),
            Err(TableFault::NotMemory) => return Err(PteFault::NotMemory),
        };
        let found = match width {
            PteWidth::Four => {
                host::compare_exchange(page.hva, current as u32, new as u32).map(u64::from)
            }
            PteWidth::Eight => host::compare_exchange(page.hva, current, new),
        }
        .map_err(|fault| {
            PteFault::Host(HostFault {
                gpa,
                hva: fault.hva,
            })
        })?;
        Ok(if found == current {
            PteUpdate::Done
        } else {
            PteUpdate::Changed
        })
    }
}

/// The slot at `gpa`, if it allows the access.
#[inline]
fn found<'s>(
    slots: &'s mut slot::Reader,
    stats: &VcpuStats,
    gpa: Gpa,
    kind: AccessKind,
) -> Result<&'s Slot, Fault> {
    if slots.find(gpa.frame()).is_none() {
        return Err(missing(slots, stats, gpa));
    }
    let slot = slots.find(gpa.frame()).ok_or(Fault::Mmio { gpa })?;
    if kind == AccessKind::Write && !slot.is_writable() {
        let hva = slot.hva_at(gpa).unwrap_or(slot.hva);
        return Err(Fault::ReadOnly { gpa, hva });
    }
    Ok(slot)
}

/// No slot: a device's, or private memory that nobody has provided.
#[cold]
fn missing(slots: &mut slot::Reader, stats: &VcpuStats, gpa: Gpa) -> Fault {
    if slots.table().is_private(gpa.frame()) {
        let hva = Hva::new(0);
        return Fault::Host(HostFault { gpa, hva });
    }
    stats.pf_mmio_spte_created.increment();
    Fault::Mmio { gpa }
}

/// What a slot says of the page at `gpa`, which lies inside; a write is logged.
#[inline]
fn page_of(slot: &Slot, ring: Option<&SharedRing>, gpa: Gpa, kind: AccessKind) -> HostPage {
    let gfn = gpa.frame();
    HostPage {
        hva: slot.hva_at(gpa).unwrap_or(slot.hva),
        size: size_of(largest_level(slot, gfn)),
        writable: slot.is_writable() && (!slot.logs_dirty() || is_marked(slot, ring, gfn, kind)),
    }
}

/// Whether the log knows of the page; a write makes it known.
fn is_marked(slot: &Slot, ring: Option<&SharedRing>, gfn: Gfn, kind: AccessKind) -> bool {
    if kind == AccessKind::Write {
        mark_dirty(slot, ring, gfn);
        return true;
    }
    let page = gfn.number().wrapping_sub(slot.base_gfn.number());
    slot.dirty.as_ref().is_some_and(|d| d.is_marked(page))
}

fn mark_dirty(slot: &Slot, ring: Option<&SharedRing>, gfn: Gfn) {
    if slot.dirty.is_some() {
        slot.mark_dirty(gfn);
    } else if let (Some(ring), Some(offset)) = (ring, slot.page_of(gfn)) {
        let entry = DirtyGfn {
            slot: slot.id.raw(),
            offset,
        };
        // A full ring and a ring that the host took away both show in `dirty_ring_full`, which
        // the vCPU asks before it goes on.
        let _: Result<Pushed, _> = lock(ring).push(entry);
    }
}

/// What a fault on `gfn` of `slot` is to install.
fn plan(slot: &Slot, gfn: Gfn, kind: AccessKind, level: u8) -> Install {
    let page = gfn.number().wrapping_sub(slot.base_gfn.number());
    let noticed = kind == AccessKind::Write || !slot.logs_dirty();
    Install {
        frame: addr::Hfn::new(slot.hva.frame().number() + page),
        level,
        writes: if slot.is_writable() && noticed {
            Writes::Allowed
        } else {
            Writes::Fault
        },
    }
}

/// The largest level whose page around `gfn` lies inside the slot; the lowest where it logs.
fn largest_level(slot: &Slot, gfn: Gfn) -> u8 {
    if slot.logs_dirty() {
        return 1;
    }
    let first = slot.base_gfn.number();
    let end = first + slot.npages;
    for level in [3, 2] {
        let pages = pages_of(level);
        let start = gfn.number() & !(pages - 1);
        if start >= first && start + pages <= end {
            return level;
        }
    }
    1
}

/// The level of the host's own page for `gfn`, where the second level has no table yet and the slot
/// has room. The page is there before its size is asked for, as in kvm.ko.
fn host_level(second: &SecondLevel, slot: &Slot, gfn: Gfn, kind: AccessKind) -> u8 {
    let page = gfn.number().wrapping_sub(slot.base_gfn.number());
    let frame = slot.hva.frame().number().wrapping_add(page);
    let aligned = |level: u8| (frame ^ gfn.number()).is_multiple_of(pages_of(level));
    let mut level = largest_level(slot, gfn).min(second.first_missing(gfn));
    while level > 1 && !aligned(level) {
        level -= 1;
    }
    if level == 1 {
        return 1;
    }
    let hva = addr::Hfn::new(frame).start();
    // A fault here is one of the access that follows, too, and that one is told.
    let there = match kind {
        AccessKind::Write => host::compare_exchange::<u64>(hva, 0, 0).is_ok(),
        AccessKind::Read | AccessKind::Execute => host::load_word::<u64>(hva).is_ok(),
    };
    match pagemap::huge_page_at(hva) {
        Some(size) if there => (2..=level).rev().find(|l| size_of(*l) <= size).unwrap_or(1),
        _ => 1,
    }
}

/// The 4 KiB pages of an entry of this level.
fn pages_of(level: u8) -> u64 {
    size_of(level).bytes() >> PageSize::Size4K.shift()
}

/// The byte of the host page that `gpa`'s offset names.
fn in_page(page: Hva, gpa: Gpa) -> Hva {
    page.wrapping_add(gpa.page_offset(PageSize::Size4K))
}

impl Mmu {
    /// Whether this path keeps no tables of its own.
    pub(crate) fn is_direct(&self) -> bool {
        self.path() == PagingPath::Direct
    }
}
