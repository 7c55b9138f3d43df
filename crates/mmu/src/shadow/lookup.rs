//! Reading shadow pages, without a lock.

use std::sync::atomic::Ordering;

use addr::{Address, Frame, Gpa, Hfn, Hva, PageSize};
use x86::paging::PagingMode;

use super::entry::{Attributes, Entry};
use super::memory::PageMemory;
use super::state::{Format, Key, Source};
use super::{Roots, Shadow, root_index};
use crate::fill::HostPage;
use crate::mmu::lock;
use crate::registers::Regime;
use crate::rights::Rights;
use crate::walker::GuestPage;

impl Shadow {
    /// Both halves of a translation, if they are cached. Rights are not checked yet.
    #[inline]
    pub(crate) fn lookup(
        &self,
        roots: &Roots,
        regime: &Regime,
        linear: u64,
    ) -> Option<(GuestPage, HostPage)> {
        if roots.generation != self.generation.load(Ordering::Acquire) {
            return None;
        }
        let page = roots.pages[root_index(regime, linear)]?;
        Descent::new(regime, linear, page).run()
    }
}

/// One entry of the shadow tables, for those who show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowEntry {
    /// 1 is the lowest.
    pub level: u8,
    /// The entry as it stands in memory; 0 is empty.
    pub raw: u64,
    /// Where it leads, if it maps a page: the host address of the byte asked for.
    pub hva: Option<Hva>,
    /// Its flags: `P`, `leaf`, `R`, `W`, `X`, `U`, `G`, `D`.
    pub flags: Vec<&'static str>,
}

impl Shadow {
    /// The entries on the way to `linear` from the root that these registers select, as a vCPU
    /// with these registers would find them; none where that root has no shadow page yet.
    pub(crate) fn path_to(
        &self,
        root: Hfn,
        space: usize,
        regime: &Regime,
        linear: u64,
    ) -> Vec<ShadowEntry> {
        let state = lock(&self.state);
        let mut level = regime.mode.levels();
        let key = Key {
            source: Source::Table(root),
            level,
            space,
            format: Format::of(regime),
        };
        let found = state.by_key.get(&key).map(|id| state.page(*id).memory);
        let mut path = Vec::new();
        let mut next = found;
        while let Some(page) = next {
            let entry = Entry(
                page.entry(regime.index(level, linear))
                    .load(Ordering::Acquire),
            );
            path.push(shown(entry, level, regime.mode, linear));
            next = entry.is_link().then(|| below(page, entry));
            level -= 1;
        }
        path
    }
}

fn shown(entry: Entry, level: u8, mode: PagingMode, linear: u64) -> ShadowEntry {
    let rights = entry.rights();
    let attributes = entry.attributes();
    let flags = [
        (entry.is_present(), "P"),
        (entry.is_leaf(), "leaf"),
        (entry.is_guest_page(), "part of a large page"),
        (entry.host_writable(), "W"),
        (rights.contains(Rights::WRITE), "guest R/W"),
        (rights.contains(Rights::USER), "guest U/S"),
        (rights.contains(Rights::EXECUTE), "guest X"),
        (attributes.global, "G"),
        (attributes.dirty, "D"),
    ];
    let offset = linear & size_of(mode, level).offset_mask();
    ShadowEntry {
        level,
        raw: entry.0,
        hva: entry
            .is_leaf()
            .then(|| entry.frame().start().wrapping_add(offset)),
        flags: flags
            .into_iter()
            .filter(|(set, _)| *set && entry.is_present())
            .map(|(_, name)| name)
            .collect(),
    }
}

struct Descent<'a> {
    regime: &'a Regime,
    linear: u64,
    page: PageMemory,
    level: u8,
    rights: Rights,
    attributes: Attributes,
    /// The guest's entry that maps the page, where it is a large one, and its level.
    large: Option<(u64, u8)>,
}

impl<'a> Descent<'a> {
    fn new(regime: &'a Regime, linear: u64, page: PageMemory) -> Self {
        Self {
            regime,
            linear,
            page,
            level: regime.mode.levels(),
            rights: Rights::all(),
            attributes: Attributes::default(),
            large: None,
        }
    }

    #[inline]
    fn run(mut self) -> Option<(GuestPage, HostPage)> {
        loop {
            let index = self.regime.index(self.level, self.linear);
            let cell = self.page.entry(index);
            let entry = Entry(cell.load(Ordering::Acquire));
            if !entry.is_present() {
                return None;
            }
            self.rights &= entry.rights();
            self.attributes = self.attributes.union(entry.attributes());
            let guest = self.page.guest(index).load(Ordering::Acquire);
            // The guest's entry is written while the entry is empty: if the entry is still there,
            // the two belong together.
            if cell.load(Ordering::Acquire) != entry.0 {
                return None;
            }
            if entry.is_leaf() {
                return Some(self.found(entry, guest));
            }
            if entry.is_guest_page() {
                self.large = Some((guest, self.level));
            }
            self.page = below(self.page, entry);
            self.level -= 1;
        }
    }

    fn found(&self, leaf: Entry, guest: u64) -> (GuestPage, HostPage) {
        let (guest, guest_level) = self.large.unwrap_or((guest, self.level));
        let guest_size = size_of(self.regime.mode, guest_level);
        let base = self.regime.page_address(guest, guest_size);
        let size = size_of(self.regime.mode, self.level);
        let page = GuestPage {
            gpa: Gpa::new(base | (self.linear & guest_size.offset_mask())),
            size: guest_size,
            rights: self.rights,
            pkey: if self.regime.protection_keys {
                self.attributes.key
            } else {
                0
            },
            global: self.attributes.global && self.regime.global_pages,
            dirty: self.attributes.dirty,
        };
        let host = HostPage {
            hva: leaf
                .frame()
                .start()
                .wrapping_add(self.linear & size.offset_mask()),
            size,
            writable: leaf.host_writable(),
        };
        (page, host)
    }
}

/// The page that a link leads to; all pages of one root have equally many entries.
#[expect(unsafe_code, reason = "links hold addresses of shadow pages")]
fn below(page: PageMemory, link: Entry) -> PageMemory {
    // SAFETY: links get their addresses from pages of the same arena, which lives as long as the
    // shadow tables, and of the same format, so of as many entries.
    unsafe { PageMemory::from_address(link.address(), page.len()) }
}

/// The page that an entry of this level maps.
pub(super) fn size_of(mode: PagingMode, level: u8) -> PageSize {
    match (mode, level) {
        (_, 1) => PageSize::Size4K,
        (PagingMode::Bits32, _) => PageSize::Size4M,
        (_, 2) => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}
