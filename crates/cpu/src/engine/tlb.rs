//! The TLBs' contents: filling and flushing, address spaces (SDM 3A, 5.10).
//!
//! The first level is what translated code looks into: the inline TLB for data, the instruction TLB
//! for the identity of code pages. It holds 4 KiB pages; where the guest's page is larger, `INVLPG`
//! of any address in it must drop all of its pieces, so it is kept where there may be some
//! ([`super::large`]).
//!
//! It has no tags for address spaces. When the guest goes to another one, the entries that are not
//! global are put aside under the CR3 that they belong to, PCID and all, and come back when the guest
//! does; a guest without PCIDs has them dropped. An address space is known by all of CR3, not by the
//! PCID alone, so that one PCID used for two page tables never mixes them.
//!
//! | invalidation | present space | global | put aside |
//! |---|---|---|---|
//! | `INVLPG` | the page | the page | stay |
//! | CR3 written, bit 63 clear; `INVPCID` 1 of the present PCID | dropped | stay | others stay |
//! | `INVPCID` 0, 1 of another PCID | stay | stay | that PCID's dropped |
//! | `INVPCID` 3 | dropped | stay | dropped |
//! | `INVPCID` 2, CR0.PG, CR4.PGE and the like, whatever the MMU asks for | dropped | dropped | dropped |

use addr::{Address, Gva, Gvn, Hva, PageSize};
use x86::control::CR3_PCID;

use super::filled::{Filled, Scope};
use super::frame::{InlineTlb, TLB_ENTRIES, View, XTLB_ENTRIES};
use super::large::{Dropped, LargePages, REGION_PAGES};

/// A tag that no page number cancels.
const NEVER: u64 = 1;
/// Pages that a run has at most on each side.
pub(crate) const LONGEST_RUN: u64 = 512;
/// How far it looks from a page that has only now been filled: a stream that meets one new page after
/// another asks again at each, and would look at the same pages behind it every time.
pub(crate) const FRESH_RUN: u64 = 8;
/// How many address spaces are put aside.
const SPACES: usize = 16;

/// What may be done through an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

/// What an entry is made for: the guest's page and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) size: PageSize,
    pub(crate) scope: Scope,
}

/// Pages of the TLB that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: Gva,
    /// In bytes.
    pub(crate) length: u64,
    /// Host address minus guest address.
    pub(crate) addend: u64,
}

/// An entry of the inline TLB that was put aside.
#[derive(Clone, Copy, Debug)]
struct DataEntry {
    view: View,
    at: u16,
    read: u64,
    write: u64,
    addend: u64,
}

/// An entry of the instruction TLB that was put aside.
#[derive(Clone, Copy, Debug)]
struct CodeEntry {
    view: View,
    at: u16,
    id: u32,
}

/// The entries of an address space that is not the present one.
#[derive(Clone, Debug, Default)]
struct Space {
    cr3: u64,
    data: Vec<DataEntry>,
    code: Vec<CodeEntry>,
}

/// What is known of the TLBs besides their arrays.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlbBook {
    data: Filled<{ TLB_ENTRIES / 64 }>,
    code: Filled<{ XTLB_ENTRIES / 64 }>,
    large: LargePages,
    /// The address spaces put aside, the latest last.
    aside: Vec<Space>,
    /// One that is free, for the memory that it has.
    spare: Space,
}

/// The TLBs of a vCPU.
#[derive(Debug)]
pub(crate) struct Tlb<'a> {
    pub(crate) data: &'a mut [InlineTlb; 3],
    pub(crate) code: &'a mut [[u32; XTLB_ENTRIES]; 3],
    pub(crate) book: &'a mut TlbBook,
}

fn data_index(page: Gvn) -> usize {
    page.number() as usize % TLB_ENTRIES
}

/// The entry of the instruction TLB for a page.
pub(crate) fn code_index(page: Gvn) -> usize {
    page.number() as usize % XTLB_ENTRIES
}

fn tag(page: Gvn) -> u64 {
    page.number().wrapping_neg()
}

impl Tlb<'_> {
    /// What the inline TLB holds for an address.
    pub(crate) fn peek(&self, view: View, gva: Gva) -> Option<(Hva, Rights)> {
        let tlb = &self.data[view as usize];
        let at = data_index(gva.frame());
        let rights = Rights {
            read: tlb.read[at] == tag(gva.frame()),
            write: tlb.write[at] == tag(gva.frame()),
        };
        let hva = Hva::new(gva.raw().wrapping_add(tlb.addend[at]));
        (rights.read || rights.write).then_some((hva, rights))
    }

    /// Whether the entry for the page of `gva` stands for no page at all.
    pub(crate) fn is_free(&self, view: View, gva: Gva) -> bool {
        let (tlb, at) = (&self.data[view as usize], data_index(gva.frame()));
        (tlb.read[at], tlb.write[at]) == (NEVER, NEVER)
    }

    /// Makes an entry for the page of `gva`, whose byte lies at `hva`.
    pub(crate) fn fill(&mut self, view: View, gva: Gva, hva: Hva, extent: Extent, rights: Rights) {
        let tlb = &mut self.data[view as usize];
        let at = data_index(gva.frame());
        let tag = tag(gva.frame());
        self.book.data.mark(view, at, extent.scope);
        self.book.large.add(gva, extent.size);
        tlb.addend[at] = hva.raw().wrapping_sub(gva.raw());
        tlb.read[at] = if rights.read { tag } else { NEVER };
        tlb.write[at] = if rights.write { tag } else { NEVER };
    }

    /// Makes an entry for the code page that holds `gva`.
    pub(crate) fn fill_code(&mut self, view: View, gva: Gva, id: u32, extent: Extent) {
        let at = code_index(gva.frame());
        self.book.code.mark(view, at, extent.scope);
        self.book.large.add(gva, extent.size);
        self.code[view as usize][at] = id;
    }

    /// Where the bytes lie, if they are in one page that may be accessed so without asking.
    pub(crate) fn find(&self, view: View, gva: Gva, length: u64, writes: bool) -> Option<Hva> {
        let tlb = &self.data[view as usize];
        let page = gva.wrapping_add(length.wrapping_sub(1)).frame();
        let at = data_index(gva.frame());
        let found = if writes { tlb.write[at] } else { tlb.read[at] };
        (found == tag(page)).then(|| Hva::new(gva.raw().wrapping_add(tlb.addend[at])))
    }

    /// The longest run of pages side by side, in the guest and in the host, around these bytes; at
    /// most `reach` pages to either side.
    pub(crate) fn run(
        &self,
        view: View,
        gva: Gva,
        length: u64,
        writes: bool,
        reach: u64,
    ) -> Option<Run> {
        let tlb = &self.data[view as usize];
        let tags = if writes { &tlb.write } else { &tlb.read };
        let first = gva.frame().number();
        let addend = tlb.addend[first as usize % TLB_ENTRIES];
        let has = |number: u64| {
            let at = number as usize % TLB_ENTRIES;
            tags[at] == number.wrapping_neg() && tlb.addend[at] == addend
        };
        if !has(first) {
            return None;
        }
        let above = (1..reach).take_while(|n| has(first + n)).count() as u64;
        let below = (1..reach.min(first + 1)).take_while(|n| has(first - n));
        let start = first - below.count() as u64;
        let found = (first + above + 1 - start) << 12;
        let offset = gva.raw() - (start << 12);
        (offset + length <= found).then_some(Run {
            start: Gva::new(start << 12),
            length: found,
            addend,
        })
    }

    /// Drops all entries, those put aside included.
    pub(crate) fn flush(&mut self) {
        self.flush_present();
        self.book.aside.clear();
        self.book.large.clear();
    }

    fn flush_present(&mut self) {
        let (data, code) = (&mut *self.data, &mut *self.code);
        self.book.data.drain_all(|view, at| {
            data[view as usize].read[at] = NEVER;
            data[view as usize].write[at] = NEVER;
        });
        self.book
            .code
            .drain_all(|view, at| code[view as usize][at] = 0);
    }

    /// Drops all entries, whatever the book says.
    pub(crate) fn clear(&mut self) {
        for tlb in self.data.iter_mut() {
            tlb.read.fill(NEVER);
            tlb.write.fill(NEVER);
        }
        self.code.iter_mut().for_each(|code| code.fill(0));
        *self.book = TlbBook::default();
    }

    /// Drops the present address space's entries.
    pub(crate) fn flush_local(&mut self) {
        let (data, code) = (&mut *self.data, &mut *self.code);
        self.book.data.drain_local(|view, at| {
            data[view as usize].read[at] = NEVER;
            data[view as usize].write[at] = NEVER;
        });
        self.book
            .code
            .drain_local(|view, at| code[view as usize][at] = 0);
    }

    /// Drops all that are not global, those put aside included.
    pub(crate) fn flush_all_local(&mut self) {
        self.flush_local();
        self.book.aside.clear();
    }

    /// Drops what was put aside for a PCID.
    pub(crate) fn flush_aside(&mut self, pcid: u16) {
        let pcid = u64::from(pcid);
        self.book.aside.retain(|space| space.cr3 & CR3_PCID != pcid);
    }

    /// Drops pages of code that are no more, here and of what was put aside.
    pub(crate) fn forget_code(&mut self, pages: &[(Gvn, u32)]) {
        for (page, id) in pages {
            for code in self.code.iter_mut() {
                let entry = &mut code[code_index(*page)];
                if entry == id {
                    *entry = 0;
                }
            }
        }
        if pages.is_empty() {
            return;
        }
        let is_gone = |entry: &CodeEntry| pages.iter().any(|(_, id)| *id == entry.id);
        for space in &mut self.book.aside {
            space.code.retain(|entry| !is_gone(entry));
        }
    }

    /// Drops what the instruction TLB holds for one view, and what was put aside of it.
    pub(crate) fn flush_code_of(&mut self, view: View) {
        let code = &mut self.code[view as usize];
        self.book.code.drain_of(view, |at| code[at] = 0);
        for space in &mut self.book.aside {
            space.code.retain(|entry| entry.view != view);
        }
    }

    /// Drops all that the instruction TLB holds, and what was put aside of it.
    pub(crate) fn flush_code(&mut self) {
        let code = &mut *self.code;
        self.book
            .code
            .drain_all(|view, at| code[view as usize][at] = 0);
        for space in &mut self.book.aside {
            space.code.clear();
        }
    }

    /// Drops all that allow writes.
    pub(crate) fn flush_writes(&mut self) {
        let data = &mut *self.data;
        self.book
            .data
            .for_each(|view, at| data[view as usize].write[at] = NEVER);
        for space in &mut self.book.aside {
            space.data.iter_mut().for_each(|e| e.write = NEVER);
        }
    }

    /// Drops the page that holds `gva`, of the present address space or global.
    pub(crate) fn flush_page(&mut self, gva: Gva) {
        match self.book.large.dropped_with(gva) {
            Dropped::Page => self.flush_piece(gva),
            Dropped::Regions(regions) => {
                for region in regions {
                    self.flush_region(region);
                }
            }
            Dropped::All => self.flush_present(),
        }
    }

    /// Drops what has the number of a region of 2 MiB.
    fn flush_region(&mut self, region: u64) {
        let (data, book) = (&mut *self.data, &self.book.data);
        let first = region * REGION_PAGES;
        let start = first as usize % TLB_ENTRIES;
        let is_in = |tag: u64| tag.wrapping_neg() / REGION_PAGES == region;
        book.for_each_in(start, REGION_PAGES as usize, |view, at| {
            let tlb = &mut data[view as usize];
            if is_in(tlb.read[at]) || is_in(tlb.write[at]) {
                tlb.read[at] = NEVER;
                tlb.write[at] = NEVER;
            }
        });
        let start = first as usize % XTLB_ENTRIES;
        for code in self.code.iter_mut() {
            code[start..start + REGION_PAGES as usize].fill(0);
        }
    }

    fn flush_piece(&mut self, gva: Gva) {
        let at = data_index(gva.frame());
        for tlb in self.data.iter_mut() {
            tlb.read[at] = NEVER;
            tlb.write[at] = NEVER;
        }
        for code in self.code.iter_mut() {
            code[code_index(gva.frame())] = 0;
        }
    }

    /// Goes from one address space to another, whose entries come back if they were put aside.
    pub(crate) fn switch(&mut self, from: u64, to: u64) {
        self.put_aside(from);
        let known = self.book.aside.iter().position(|space| space.cr3 == to);
        if let Some(index) = known {
            let space = self.book.aside.remove(index);
            self.bring_back(&space);
            self.book.spare = space;
        }
    }

    fn put_aside(&mut self, cr3: u64) {
        let mut space = std::mem::take(&mut self.book.spare);
        space.cr3 = cr3;
        space.data.clear();
        space.code.clear();
        let (data, code) = (&mut *self.data, &mut *self.code);
        self.book.data.drain_local(|view, at| {
            let tlb = &mut data[view as usize];
            let (read, write) = (tlb.read[at], tlb.write[at]);
            tlb.read[at] = NEVER;
            tlb.write[at] = NEVER;
            if (read, write) != (NEVER, NEVER) {
                space.data.push(DataEntry {
                    view,
                    at: at as u16,
                    read,
                    write,
                    addend: tlb.addend[at],
                });
            }
        });
        self.book.code.drain_local(|view, at| {
            let id = std::mem::take(&mut code[view as usize][at]);
            if id != 0 {
                space.code.push(CodeEntry {
                    view,
                    at: at as u16,
                    id,
                });
            }
        });
        let aside = &mut self.book.aside;
        aside.retain(|other| other.cr3 != cr3);
        if aside.len() == SPACES {
            aside.remove(0);
        }
        aside.push(space);
    }

    fn bring_back(&mut self, space: &Space) {
        for entry in &space.data {
            let (tlb, at) = (&mut self.data[entry.view as usize], usize::from(entry.at));
            self.book.data.mark(entry.view, at, Scope::Local);
            tlb.read[at] = entry.read;
            tlb.write[at] = entry.write;
            tlb.addend[at] = entry.addend;
        }
        for entry in &space.code {
            let at = usize::from(entry.at);
            self.book.code.mark(entry.view, at, Scope::Local);
            self.code[entry.view as usize][at] = entry.id;
        }
    }
}
