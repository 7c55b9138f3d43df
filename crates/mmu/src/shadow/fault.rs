//! Caching the way that a walk took.

use std::sync::atomic::Ordering;

use addr::{Address, Gpa, Hfn, PageSize};
use memory::slot;
use x86::paging::{PagingMode, Pte};

use super::entry::{Attributes, Below, Entry};
use super::lookup::size_of;
use super::state::{EntryRef, Key, PageId, Source, State};
use super::{Format, Roots, Shadow, root_index};
use crate::access::{AccessKind, Fault};
use crate::fill::{Fill, HostPage};
use crate::mmu::lock;
use crate::registers::Regime;
use crate::rights::Rights;
use crate::slot_tables::SlotTables;
use crate::walker::{GuestPage, GuestPhysical, Step};

/// The entries of one walk, by level.
#[derive(Clone, Copy, Default)]
pub(crate) struct Path {
    steps: [Option<Step>; 5],
}

impl Path {
    /// For [`crate::walker::walk`]: the last attempt of a walk is what remains.
    pub(crate) fn record(&mut self, step: Step, mode: PagingMode) {
        // A PDPTE is in no table.
        if step.level > mode.levels() {
            return;
        }
        if step.level == mode.levels() {
            self.steps = [None; 5];
        }
        self.steps[usize::from(step.level) - 1] = Some(step);
    }

    fn top_down(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().rev().flatten()
    }
}

/// The guest changed its tables meanwhile.
pub(crate) struct Retry;

/// One entry of the way, as it stands in memory now.
struct Now {
    level: u8,
    frame: Hfn,
    value: u64,
}

impl Shadow {
    /// Finds the host page of a walk's result and caches the way. The answer of the inner result is
    /// what the memslots say.
    pub(crate) fn install(
        &self,
        fill: &mut Fill<'_>,
        roots: &mut Roots,
        regime: &Regime,
        path: &Path,
        page: &GuestPage,
    ) -> Result<Result<HostPage, Fault>, Retry> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let slots = fill.mmu.slots().snapshot(fill.space);
        let now = reread(&slots, regime, path)?;
        // Under the lock: a harvest of the dirty log takes its marks first and this lock second, so
        // a leaf that takes writes is marked, or found by that harvest.
        let mut host = match fill.slot_page(page.gpa, fill.access.kind) {
            Ok(host) => host,
            Err(fault) => return Ok(Err(fault)),
        };
        let linear = regime.linear(fill.gva);
        state.admit_writes(&mut host, fill.access.kind);
        let root = self.root(state, roots, fill.space, regime, linear, &now);
        let mut way = Way {
            state: &mut *state,
            slots: &slots,
            space: fill.space,
            regime,
            linear,
            page,
            host: &host,
        };
        let level = way.install(root, &now);
        drop(slots);
        // Not more: there may be a protected table around.
        host.size = size_of(regime.mode, level);
        self.publish(&guard);
        Ok(Ok(host))
    }

    /// The host page at `gpa` with paging off: no tables, nothing to cache.
    pub(crate) fn unpaged(&self, fill: &mut Fill<'_>, gpa: Gpa) -> Result<HostPage, Fault> {
        let mut state = lock(&self.state);
        let mut host = fill.slot_page(gpa, fill.access.kind)?;
        state.admit_writes(&mut host, fill.access.kind);
        if !state.protected_blocks.is_empty() {
            host.size = PageSize::Size4K;
        }
        self.publish(&state);
        Ok(host)
    }

    fn root(
        &self,
        state: &mut State,
        roots: &mut Roots,
        space: usize,
        regime: &Regime,
        linear: u64,
        now: &[Now],
    ) -> PageId {
        let key = Key {
            source: Source::Table(now[0].frame),
            level: regime.mode.levels(),
            space,
            format: Format::of(regime),
        };
        let id = state.page_for(key);
        let generation = self.generation.load(Ordering::Acquire);
        if roots.generation != generation {
            roots.generation = generation;
            roots.pages = [None; 4];
        }
        let index = root_index(regime, linear);
        roots.pages[index] = Some(state.page(id).memory);
        state.roots.entry(roots.vcpu).or_default()[index] = Some(id);
        id
    }
}

impl State {
    /// A write to a protected table makes it unsynchronised; a read of one may not become a write.
    fn admit_writes(&mut self, host: &mut HostPage, kind: AccessKind) {
        let frame = host.hva.frame();
        if !self.is_protected(frame) {
            return;
        }
        if kind == AccessKind::Write {
            self.unprotect(frame);
        } else {
            host.writable = false;
        }
    }

    /// A guest store to a protected table goes on.
    fn unprotect(&mut self, frame: Hfn) {
        let Some(table) = self.tables.get_mut(&frame) else {
            return;
        };
        table.protected = false;
        table.quiet = 0;
        self.written += 1;
        self.unsync.push(frame);
        let block = super::state::block_of(frame);
        if let Some(count) = self.protected_blocks.get_mut(&block) {
            *count -= 1;
            if *count == 0 {
                self.protected_blocks.remove(&block);
            }
        }
    }
}

/// The way's entries as they are now; they must be those that the walk read (but for A and D, which
/// it has set meanwhile).
fn reread(slots: &slot::Table, regime: &Regime, path: &Path) -> Result<Vec<Now>, Retry> {
    let mut memory = SlotTables::new(slots);
    let accessed_dirty = (Pte::A | Pte::D).bits();
    path.top_down()
        .map(|step| {
            let value = memory
                .read_pte(step.gpa, regime.width())
                .map_err(|_| Retry)?;
            let slot = slots.find(step.gpa.frame()).ok_or(Retry)?;
            let hva = slot.hva_at(step.gpa).ok_or(Retry)?;
            let accessed = value & Pte::A.bits() != 0 || !slot.is_writable();
            if (value ^ step.value) & !accessed_dirty != 0 || !accessed {
                return Err(Retry);
            }
            Ok(Now {
                level: step.level,
                frame: hva.frame(),
                value,
            })
        })
        .collect()
}

/// Installing one way, from the root down.
struct Way<'a> {
    state: &'a mut State,
    slots: &'a slot::Table,
    space: usize,
    regime: &'a Regime,
    linear: u64,
    page: &'a GuestPage,
    host: &'a HostPage,
}

impl Way<'_> {
    /// Returns the level of the leaf.
    fn install(&mut self, root: PageId, now: &[Now]) -> u8 {
        let mut parent = root;
        for pair in now.windows(2) {
            let [upper, lower] = pair else { break };
            let key = self.key(Source::Table(lower.frame), lower.level);
            let at = self.at(parent, upper.level);
            let child = self.table_below(at, key);
            let rights = Rights::of_entry(upper.value);
            self.link(
                at,
                child,
                Below::Table,
                rights,
                Attributes::default(),
                upper.value,
            );
            parent = child;
        }
        now.last().map_or(1, |last| self.install_page(parent, last))
    }

    /// The shadow page of a table that is to be linked at `at`.
    ///
    /// What it holds from an earlier life may be stale: the guest need not invalidate anything when
    /// it takes a table into use where there was none, and no TLB would find what was cached
    /// elsewhere.
    fn table_below(&mut self, at: EntryRef, key: Key) -> PageId {
        let Some(child) = self.state.known_page(&key) else {
            return self.state.page_for(key);
        };
        if !self.state.is_linked(at, child) {
            self.state.catch_up(child);
        }
        child
    }

    /// The guest's entry that maps the page: a leaf, or a link to parts.
    fn install_page(&mut self, parent: PageId, last: &Now) -> u8 {
        let rights = Rights::of_entry(last.value);
        let attributes = attributes(last.value);
        let mut at = self.at(parent, last.level);
        let mut leaf = (rights, attributes, last.value);
        let mut level = last.level;
        let mut first = self.page.gpa.align_down(size_of(self.regime.mode, level));
        while !self.fits_leaf(level, first) {
            level -= 1;
            first = self.page.gpa.align_down(size_of(self.regime.mode, level));
            let parts = self
                .page
                .gpa
                .align_down(size_of(self.regime.mode, level + 1));
            let key = self.key(Source::Direct(parts), level);
            let child = self.state.page_for(key);
            self.link(at, child, Below::Parts, leaf.0, leaf.1, leaf.2);
            at = self.at(child, level);
            leaf = (Rights::all(), Attributes::default(), first.raw());
        }
        self.leaf(at, level, leaf);
        level
    }

    /// Whether one leaf of this level can map the guest physical page from `first` on.
    fn fits_leaf(&self, level: u8, first: Gpa) -> bool {
        if level == 1 {
            return true;
        }
        let pages = size_of(self.regime.mode, level).bytes() >> PageSize::Size4K.shift();
        // Up to 4 MiB: the reverse map lists every block that a leaf touches.
        if level > 2 {
            return false;
        }
        let Some(slot) = self.slots.find(first.frame()) else {
            return false;
        };
        let inside = slot
            .page_of(first.frame())
            .is_some_and(|page| page + pages <= slot.npages);
        inside && !slot.logs_dirty() && !self.state.near_protected(self.first_frame(level), pages)
    }

    /// The host frame where the page of this level begins.
    fn first_frame(&self, level: u8) -> Hfn {
        let within = self.page.gpa.page_offset(size_of(self.regime.mode, level));
        Hfn::new(self.host.hva.raw().wrapping_sub(within) >> PageSize::Size4K.shift())
    }

    fn leaf(
        &mut self,
        at: EntryRef,
        level: u8,
        (rights, attributes, guest): (Rights, Attributes, u64),
    ) {
        let mut leaf = Entry::leaf(self.first_frame(level), rights, attributes);
        if self.host.writable {
            leaf = leaf.allow_writes();
        }
        self.state.set(at, leaf, guest);
    }

    fn link(
        &mut self,
        at: EntryRef,
        child: PageId,
        below: Below,
        rights: Rights,
        attributes: Attributes,
        guest: u64,
    ) {
        let address = self.state.page(child).memory.address();
        let link = Entry::link(address, below, rights, attributes);
        self.state.set(at, link, guest);
    }

    fn key(&self, source: Source, level: u8) -> Key {
        Key {
            source,
            level,
            space: self.space,
            format: Format::of(self.regime),
        }
    }

    fn at(&self, page: PageId, level: u8) -> EntryRef {
        EntryRef {
            page,
            index: self.regime.index(level, self.linear),
        }
    }
}

/// G, D and protection key of an entry that maps a page, whether or not they are in force.
fn attributes(pte: u64) -> Attributes {
    let bits = Pte::from_bits_retain(pte);
    Attributes {
        global: bits.contains(Pte::G),
        dirty: bits.contains(Pte::D),
        key: bits.protection_key(),
    }
}
