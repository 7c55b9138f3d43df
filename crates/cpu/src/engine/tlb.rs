//! The inline TLB's contents: filling and flushing.
//!
//! The first level is what translated code looks into. It holds 4 KiB pages; where the guest's page
//! is larger, `INVLPG` of any address in it must drop all of its pieces, so the range of addresses
//! with such pieces is kept.

use addr::{Address, Gva, Gvn, Hva, PageSize};

use super::frame::{InlineTlb, TLB_ENTRIES, View};

/// A tag that no page number cancels.
const NEVER: u64 = 1;

/// What may be done through an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// Where pieces of large pages are in the TLB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LargePages {
    lowest: u64,
    highest: u64,
}

impl Default for LargePages {
    fn default() -> Self {
        Self {
            lowest: u64::MAX,
            highest: 0,
        }
    }
}

impl LargePages {
    fn add(&mut self, gva: Gva, size: PageSize) {
        let start = gva.align_down(size).raw();
        self.lowest = self.lowest.min(start);
        self.highest = self.highest.max(start + size.offset_mask());
    }

    fn contains(&self, gva: Gva) -> bool {
        (self.lowest..=self.highest).contains(&gva.raw())
    }
}

/// Which entries were made since the last flush, so that a flush need not touch all.
#[derive(Clone, Debug, Default)]
pub(crate) struct FillLog {
    entries: Vec<(View, u16)>,
    large: LargePages,
}

/// With more entries than this a flush touches all.
const MOST: usize = 2048;

/// The three inline TLBs of a vCPU.
#[derive(Debug)]
pub(crate) struct Tlb<'a> {
    pub(crate) views: &'a mut [InlineTlb; 3],
    pub(crate) log: &'a mut FillLog,
}

fn index(page: Gvn) -> usize {
    page.number() as usize % TLB_ENTRIES
}

impl Tlb<'_> {
    /// Makes an entry for the page of `gva`, whose byte lies at `hva`.
    pub(crate) fn fill(&mut self, view: View, gva: Gva, hva: Hva, size: PageSize, rights: Rights) {
        let tlb = &mut self.views[view as usize];
        let at = index(gva.frame());
        let tag = gva.frame().number().wrapping_neg();
        if self.log.entries.len() <= MOST {
            self.log.entries.push((view, at as u16));
        }
        tlb.addend[at] = hva.raw().wrapping_sub(gva.raw());
        tlb.read[at] = if rights.read { tag } else { NEVER };
        tlb.write[at] = if rights.write { tag } else { NEVER };
        if size != PageSize::Size4K {
            self.log.large.add(gva, size);
        }
    }

    /// Whether the bytes lie in one page that may be accessed so without asking.
    pub(crate) fn covers(&self, view: View, gva: Gva, length: u64, writes: bool) -> bool {
        let tlb = &self.views[view as usize];
        let page = gva.wrapping_add(length - 1).frame();
        let at = index(gva.frame());
        let tag = if writes { tlb.write[at] } else { tlb.read[at] };
        tag == page.number().wrapping_neg()
    }

    /// Drops all entries.
    pub(crate) fn flush(&mut self) {
        if self.log.entries.len() > MOST {
            self.clear();
        } else {
            for (view, at) in self.log.entries.drain(..) {
                let tlb = &mut self.views[view as usize];
                tlb.read[usize::from(at)] = NEVER;
                tlb.write[usize::from(at)] = NEVER;
            }
        }
        self.log.large = LargePages::default();
    }

    /// Drops all entries, whatever the log says.
    pub(crate) fn clear(&mut self) {
        for tlb in self.views.iter_mut() {
            tlb.read.fill(NEVER);
            tlb.write.fill(NEVER);
        }
        self.log.entries.clear();
        self.log.large = LargePages::default();
    }

    /// Drops all that allow writes.
    pub(crate) fn flush_writes(&mut self) {
        if self.log.entries.len() > MOST {
            self.clear();
            return;
        }
        for (view, at) in &self.log.entries {
            self.views[*view as usize].write[usize::from(*at)] = NEVER;
        }
    }

    /// Drops the page that holds `gva`.
    pub(crate) fn flush_page(&mut self, gva: Gva) {
        if self.log.large.contains(gva) {
            self.flush();
            return;
        }
        for tlb in self.views.iter_mut() {
            let at = index(gva.frame());
            tlb.read[at] = NEVER;
            tlb.write[at] = NEVER;
        }
    }
}
