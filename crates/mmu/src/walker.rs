//! The one walker of the guest's page tables (SDM 3A, chapter 5; APM 2, 5.3 to 5.6).
//!
//! Generic over where entries come from ([`GuestPhysical`]) and over who watches ([`Observer`]):
//! TLB fills, `KVM_TRANSLATE` and `explain` share it.
//!
//! A and D bits are set with a compare-and-exchange, after the access was found to be allowed: A in
//! every entry that took part, D in the one that maps the page and only for writes. A walk that
//! faults changes nothing. Where an entry changed under the walker, the walk starts again. An entry
//! in a read-only memslot keeps its bits, as kvm.ko does it: tables in ROM come with A and D set, or
//! do without.
//!
//! An entry in no memslot (a hole, a device) ends the walk as one that is not present, which is
//! kvm.ko's answer too.

use addr::{Address, Gpa, Gva, PageSize};
use x86::page_fault::PageFaultCode;
use x86::paging::{ADDRESS_MASK, ADDRESS_MASK_32, PagingMode, Pte};

use crate::access::{Access, HostFault, PageFault};
use crate::registers::Regime;
use crate::rights::{self, Rights};

/// How wide an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PteWidth {
    /// 4 bytes: 32-bit paging.
    Four,
    /// 8 bytes: all others.
    Eight,
}

/// Why an entry can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PteFault {
    /// No memslot there.
    NotMemory,
    /// The host has no page there.
    Host(HostFault),
}

/// How an attempt to set A or D ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PteUpdate {
    /// Set.
    Done,
    /// Somebody else changed the entry first.
    Changed,
    /// The entry lies in a read-only memslot.
    ReadOnly,
}

/// Guest physical memory as the walker sees it.
pub trait GuestPhysical {
    /// Reads the entry at `gpa`, which is aligned to its width, in one atomic load.
    fn read_pte(&mut self, gpa: Gpa, width: PteWidth) -> Result<u64, PteFault>;

    /// Replaces the entry at `gpa` if it still is `current`.
    fn cmpxchg_pte(
        &mut self,
        gpa: Gpa,
        width: PteWidth,
        current: u64,
        new: u64,
    ) -> Result<PteUpdate, PteFault>;
}

/// One entry that a walk read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// 1 is the lowest level; 3 in PAE paging is a PDPTE, held in a register.
    pub level: u8,
    /// Where the entry lies; for a PDPTE where `MOV CR3` read it.
    pub gpa: Gpa,
    /// The entry.
    pub value: u64,
    /// What the entries before this one granted.
    pub rights: Rights,
}

/// Sees each entry that a walk reads, before it is judged.
pub trait Observer {
    /// One entry.
    fn entry(&mut self, step: Step);
}

/// Nobody watches.
impl Observer for () {
    fn entry(&mut self, _step: Step) {}
}

impl<F: FnMut(Step)> Observer for F {
    fn entry(&mut self, step: Step) {
        self(step);
    }
}

/// Whether a walk may write to the guest's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessedDirty {
    /// Set A and D as the architecture says.
    Set,
    /// Leave everything as it is.
    Leave,
}

/// Where the guest's tables lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPage {
    /// Guest physical address of the byte asked for.
    pub gpa: Gpa,
    /// The page that the last entry maps.
    pub size: PageSize,
    /// What all entries together grant.
    pub rights: Rights,
    /// The protection key, 0 where keys are not in force.
    pub pkey: u8,
    /// G of the last entry, with CR4.PGE.
    pub global: bool,
    /// D of the last entry, as it is after the walk. A write through an entry in a read-only
    /// memslot counts as dirty.
    pub dirty: bool,
}

/// Why a walk led nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// The guest's fault.
    Page(PageFault),
    /// The host's.
    Host(HostFault),
}

/// Most entries in memory that one walk can read.
const MAX_LEVELS: usize = 5;

/// An entry of the present walk, for setting its A and D bits.
#[derive(Clone, Copy, Default)]
struct Read {
    gpa: Gpa,
    value: u64,
}

/// How one attempt ended short of an answer.
enum Stop {
    Fault(PageFaultCode),
    Host(HostFault),
    Retry,
}

impl From<PageFaultCode> for Stop {
    fn from(code: PageFaultCode) -> Self {
        Self::Fault(code)
    }
}

impl From<PteFault> for Stop {
    fn from(fault: PteFault) -> Self {
        match fault {
            PteFault::NotMemory => Self::Fault(PageFaultCode::empty()),
            PteFault::Host(fault) => Self::Host(fault),
        }
    }
}

/// Translates `gva` for `access`.
pub fn walk<M: GuestPhysical, O: Observer>(
    memory: &mut M,
    regime: &Regime,
    gva: Gva,
    access: Access,
    policy: AccessedDirty,
    observer: &mut O,
) -> Result<GuestPage, WalkFault> {
    if regime.mode == PagingMode::Off {
        return Ok(unpaged(regime.linear(gva)));
    }
    let mut walk = Walk {
        memory,
        regime,
        linear: regime.linear(gva),
        access,
        policy,
        observer,
        path: [Read::default(); MAX_LEVELS],
    };
    loop {
        match walk.attempt() {
            Ok(page) => return Ok(page),
            Err(Stop::Retry) => {}
            Err(Stop::Host(fault)) => return Err(WalkFault::Host(fault)),
            Err(Stop::Fault(reason)) => {
                let error_code = reason | access_code(regime, access);
                return Err(WalkFault::Page(PageFault { gva, error_code }));
            }
        }
    }
}

/// The bits of the error code that describe the access.
fn access_code(regime: &Regime, access: Access) -> PageFaultCode {
    let mut code = PageFaultCode::empty();
    code.set(PageFaultCode::WRITE, access.is_write());
    code.set(PageFaultCode::USER, access.is_user());
    code.set(
        PageFaultCode::FETCH,
        access.is_fetch() && regime.reports_fetch,
    );
    code
}

fn unpaged(linear: u64) -> GuestPage {
    GuestPage {
        gpa: Gpa::new(linear),
        size: PageSize::Size1G,
        rights: Rights::all(),
        pkey: 0,
        global: false,
        dirty: true,
    }
}

struct Walk<'a, M, O> {
    memory: &'a mut M,
    regime: &'a Regime,
    linear: u64,
    access: Access,
    policy: AccessedDirty,
    observer: &'a mut O,
    /// Entries read, by level: `path[0]` is level 1.
    path: [Read; MAX_LEVELS],
}

impl<M: GuestPhysical, O: Observer> Walk<'_, M, O> {
    #[inline]
    fn attempt(&mut self) -> Result<GuestPage, Stop> {
        let mode = self.regime.mode;
        let mut table = self.top_table()?;
        let mut rights = Rights::all();
        let mut level = mode.levels();
        loop {
            let pte = self.read(table, level, rights)?;
            if pte & Pte::P.bits() == 0 {
                return Err(Stop::Fault(PageFaultCode::empty()));
            }
            let page_size = self.regime.page_size(level, pte);
            if pte & self.regime.reserved_bits(level, page_size) != 0 {
                return Err(Stop::Fault(
                    PageFaultCode::PRESENT | PageFaultCode::RESERVED,
                ));
            }
            rights &= Rights::of_entry(pte);
            if let Some(size) = page_size {
                return self.finish(level, size, rights);
            }
            table = Gpa::new(pte & self.regime.table_mask());
            level -= 1;
        }
    }

    /// The table that the walk begins at: CR3's, or in PAE paging that of a PDPTE.
    fn top_table(&mut self) -> Result<Gpa, Stop> {
        if self.regime.mode != PagingMode::Pae {
            return Ok(self.regime.root);
        }
        let index = (self.linear >> 30) & 3;
        let value = self.regime.pdptrs[index as usize];
        self.observer.entry(Step {
            level: 3,
            gpa: self.regime.root.wrapping_add(index * 8),
            value,
            rights: Rights::all(),
        });
        if value & Pte::P.bits() == 0 {
            return Err(Stop::Fault(PageFaultCode::empty()));
        }
        Ok(Gpa::new(value & ADDRESS_MASK))
    }

    fn read(&mut self, table: Gpa, level: u8, rights: Rights) -> Result<u64, Stop> {
        let gpa = self.regime.entry_of(table, level, self.linear);
        let value = self.memory.read_pte(gpa, self.regime.width())?;
        self.path[usize::from(level) - 1] = Read { gpa, value };
        self.observer.entry(Step {
            level,
            gpa,
            value,
            rights,
        });
        Ok(value)
    }

    /// The entry at `level` maps a page: check, set A and D, answer.
    fn finish(&mut self, level: u8, size: PageSize, rights: Rights) -> Result<GuestPage, Stop> {
        let pte = self.path[usize::from(level) - 1].value;
        let pkey = self.regime.protection_key(pte);
        rights::check(self.regime, rights, pkey, self.access)?;
        let write = self.access.is_write();
        if self.policy == AccessedDirty::Set {
            self.set_accessed_dirty(level)?;
        }
        let base = self.regime.page_address(pte, size);
        Ok(GuestPage {
            gpa: Gpa::new(base | (self.linear & size.offset_mask())),
            size,
            rights,
            pkey,
            global: self.regime.global_pages && pte & Pte::G.bits() != 0,
            dirty: write || pte & Pte::D.bits() != 0,
        })
    }

    fn set_accessed_dirty(&mut self, page_level: u8) -> Result<(), Stop> {
        for level in (page_level..=self.regime.mode.levels()).rev() {
            let Read { gpa, value } = self.path[usize::from(level) - 1];
            let mut wanted = value | Pte::A.bits();
            if level == page_level && self.access.is_write() {
                wanted |= Pte::D.bits();
            }
            if wanted != value {
                self.update(gpa, value, wanted)?;
            }
        }
        Ok(())
    }

    fn update(&mut self, gpa: Gpa, value: u64, wanted: u64) -> Result<(), Stop> {
        let width = self.regime.width();
        // A table that points at itself may have changed by the update one level above. Looking
        // first keeps a page out of the dirty log that won't be written.
        if self.memory.read_pte(gpa, width)? != value {
            return Err(Stop::Retry);
        }
        match self.memory.cmpxchg_pte(gpa, width, value, wanted)? {
            PteUpdate::Changed => Err(Stop::Retry),
            PteUpdate::Done | PteUpdate::ReadOnly => Ok(()),
        }
    }
}

/// How entries of this regime are read.
impl Regime {
    /// How wide entries are.
    pub fn width(&self) -> PteWidth {
        match self.mode {
            PagingMode::Bits32 => PteWidth::Four,
            _ => PteWidth::Eight,
        }
    }

    /// Where the entry lies that `linear` selects in a table of this level.
    pub(crate) fn entry_of(&self, table: Gpa, level: u8, linear: u64) -> Gpa {
        let index = self.index(level, linear) as u64;
        table.wrapping_add(index * self.mode.entry_bytes())
    }

    /// Which entry of a table of this level `linear` selects.
    pub(crate) fn index(&self, level: u8, linear: u64) -> usize {
        let bits = self.mode.index_bits();
        ((linear >> self.mode.level_shift(level)) & ((1 << bits) - 1)) as usize
    }

    /// The page that a present entry maps, or `None` where it points to a table.
    pub fn page_size(&self, level: u8, pte: u64) -> Option<PageSize> {
        let large = pte & Pte::PS.bits() != 0;
        match level {
            1 => Some(PageSize::Size4K),
            2 if large && self.mode == PagingMode::Bits32 => {
                self.page_size_extensions.then_some(PageSize::Size4M)
            }
            2 if large => Some(PageSize::Size2M),
            3 if large => Some(PageSize::Size1G),
            _ => None,
        }
    }

    /// Which bits of an entry must be 0 and are not.
    pub fn reserved_set(&self, level: u8, pte: u64) -> u64 {
        pte & self.reserved_bits(level, self.page_size(level, pte))
    }

    /// Which bits of an entry must be 0.
    pub(crate) fn reserved_bits(&self, level: u8, page: Option<PageSize>) -> u64 {
        match page {
            Some(_) => self.reserved.of_page(level),
            None => self.reserved.of_table(level),
        }
    }

    /// The bits of an entry that point to a table.
    pub fn table_mask(&self) -> u64 {
        match self.mode {
            PagingMode::Bits32 => ADDRESS_MASK_32,
            _ => ADDRESS_MASK,
        }
    }

    /// The page's address in an entry that maps one. Reserved bits are known to be 0.
    pub fn page_address(&self, pte: u64, size: PageSize) -> u64 {
        match size {
            PageSize::Size4M => (pte & 0xffc0_0000) | ((pte >> 13) & 0xff) << 32,
            _ => pte & self.table_mask() & !size.offset_mask(),
        }
    }

    /// The protection key of an entry that maps a page, 0 where keys are not in force.
    pub(crate) fn protection_key(&self, pte: u64) -> u8 {
        if self.protection_keys {
            Pte::from_bits_retain(pte).protection_key()
        } else {
            0
        }
    }
}
