//! Everything about shadow pages that only the holder of the lock sees.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::Ordering;

use addr::{Gpa, Hfn};
use x86::paging::PagingMode;

use super::entry::Entry;
use super::memory::{Arena, PageMemory};
use crate::registers::Regime;
use crate::stats::PageCounts;

/// What decides how the guest's entries are read, apart from rights, which are checked at each
/// look-up: pages of one guest table in two formats are two shadow pages (kvm.ko's "role").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Format {
    mode: PagingMode,
    page_size_extensions: bool,
    reserved: crate::reserved::Reserved,
}

impl Format {
    pub(super) fn of(regime: &Regime) -> Self {
        Self {
            mode: regime.mode,
            page_size_extensions: regime.page_size_extensions,
            reserved: regime.reserved,
        }
    }

    /// Entries of a page.
    pub(super) fn entries(self) -> usize {
        1 << self.mode.index_bits()
    }

    /// Bytes of a guest entry.
    pub(super) fn entry_bytes(self) -> u64 {
        self.mode.entry_bytes()
    }

    /// Log2 of the 4 KiB frames that an entry of this level covers.
    pub(super) fn frame_shift(self, level: u8) -> u32 {
        self.mode.level_shift(level) - 12
    }
}

/// What a shadow page shadows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// The guest's table in this host frame.
    Table(Hfn),
    /// A part of guest physical memory from here on, one to one.
    Direct(Gpa),
}

/// The name of a shadow page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) source: Source,
    pub(super) level: u8,
    pub(super) space: usize,
    pub(super) format: Format,
}

/// A shadow page's place in the slab.
pub(super) type PageId = usize;

/// One entry of one shadow page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryRef {
    pub(super) page: PageId,
    pub(super) index: usize,
}

/// What is known of a shadow page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    pub(super) key: Key,
    pub(super) memory: PageMemory,
    /// Links that lead here.
    pub(super) links: usize,
}

/// A host frame that holds a guest table.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    /// The shadow pages made from it.
    pub(super) pages: Vec<PageId>,
    /// No leaf takes writes to the frame, and no TLB does: the shadow pages are in step.
    pub(super) protected: bool,
    /// Flushes since its entries last changed.
    pub(super) quiet: u8,
}

/// A map from frame or block numbers. They come from this process, not from somebody who would
/// choose them to collide, so a multiplication is hash enough.
pub(super) type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// Hashes one number.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // 2^64 over the golden ratio; the table takes low and high bits, so fold them.
        let product = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

/// 512 host frames, the unit in which large leaves and protected frames look for each other.
pub(super) const BLOCK_SHIFT: u32 = 9;

/// The state behind the lock.
#[derive(Default)]
pub(super) struct State {
    pub(super) pages: Vec<Option<Page>>,
    vacant: Vec<PageId>,
    pub(super) by_key: HashMap<Key, PageId>,
    pub(super) by_address: NumberMap<u64, PageId>,
    pub(super) tables: NumberMap<Hfn, Table>,
    /// Tables that are not protected.
    pub(super) unsync: Vec<Hfn>,
    /// Tables that are protected, but not all TLBs are flushed yet: stores may still go by
    /// unnoticed, so they are compared like the unsynchronised.
    pub(super) settling: Vec<Hfn>,
    /// How many protected frames each block holds.
    pub(super) protected_blocks: NumberMap<u64, usize>,
    /// Reverse map of 4 KiB leaves.
    pub(super) frames: NumberMap<Hfn, Vec<EntryRef>>,
    /// Reverse map of larger leaves, by each block that they touch.
    pub(super) blocks: NumberMap<u64, Vec<EntryRef>>,
    /// Root pages in use, by vCPU.
    pub(super) roots: HashMap<u64, [Option<PageId>; 4]>,
    pub(super) arena: Arena,
    pub(super) counts: PageCounts,
    /// Pages made so far.
    pub(super) made: u64,
    /// Pages taken away so far.
    pub(super) zapped: u64,
    /// Stores to protected tables so far.
    pub(super) written: u64,
}

impl State {
    pub(super) fn page(&self, id: PageId) -> &Page {
        self.pages[id]
            .as_ref()
            .expect("ids are of pages that exist")
    }

    /// The page with this name, if there is one.
    pub(super) fn known_page(&self, key: &Key) -> Option<PageId> {
        self.by_key.get(key).copied()
    }

    /// Whether an entry is a link to this page.
    pub(super) fn is_linked(&self, at: EntryRef, child: PageId) -> bool {
        let cell = self.page(at.page).memory.entry(at.index);
        let entry = Entry(cell.load(Ordering::Relaxed));
        entry.is_link() && entry.address() == self.page(child).memory.address()
    }

    /// The page with this name, made if need be.
    pub(super) fn page_for(&mut self, key: Key) -> PageId {
        if let Some(id) = self.known_page(&key) {
            return id;
        }
        let memory = self.arena.take(key.format.entries());
        let page = Page {
            key,
            memory,
            links: 0,
        };
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.pages.push(None);
            self.pages.len() - 1
        });
        self.pages[id] = Some(page);
        self.by_key.insert(key, id);
        self.by_address.insert(memory.address(), id);
        if let Source::Table(frame) = key.source {
            self.add_to_table(frame, id);
        }
        self.made += 1;
        id
    }

    fn add_to_table(&mut self, frame: Hfn, id: PageId) {
        let table = self.tables.entry(frame).or_default();
        table.pages.push(id);
        if table.pages.len() == 1 {
            self.unsync.push(frame);
        }
    }

    /// Whether writes to a frame must be noticed.
    pub(super) fn is_protected(&self, frame: Hfn) -> bool {
        self.tables.get(&frame).is_some_and(|t| t.protected)
    }

    /// Whether any of these frames lies in a block with a protected one.
    pub(super) fn near_protected(&self, first: Hfn, pages: u64) -> bool {
        blocks_of(first, pages).any(|block| self.protected_blocks.contains_key(&block))
    }

    /// Puts an entry in its place; what was there is taken away properly.
    pub(super) fn set(&mut self, at: EntryRef, entry: Entry, guest: u64) {
        let page = *self.page(at.page);
        let old = Entry(page.memory.entry(at.index).load(Ordering::Relaxed));
        let same_guest = page.memory.guest(at.index).load(Ordering::Relaxed) == guest;
        if old == entry && same_guest {
            return;
        }
        self.clear(at);
        page.memory.guest(at.index).store(guest, Ordering::Release);
        page.memory.entry(at.index).store(entry.0, Ordering::SeqCst);
        if entry.is_leaf() {
            self.map_back(at, entry);
        } else if let Some(child) = self.by_address.get(&entry.address()) {
            let child = *child;
            self.pages[child]
                .as_mut()
                .expect("linked pages exist")
                .links += 1;
        }
    }

    /// Empties an entry.
    pub(super) fn clear(&mut self, at: EntryRef) {
        let page = *self.page(at.page);
        let old = Entry(page.memory.entry(at.index).swap(0, Ordering::SeqCst));
        if old.is_leaf() {
            self.unmap_back(at, old);
        } else if old.is_link()
            && let Some(child) = self.by_address.get(&old.address())
        {
            let child = *child;
            self.pages[child]
                .as_mut()
                .expect("linked pages exist")
                .links -= 1;
        }
    }

    /// Frames that a leaf maps.
    pub(super) fn leaf_pages(&self, at: EntryRef) -> u64 {
        let key = self.page(at.page).key;
        1 << key.format.frame_shift(key.level)
    }

    fn map_back(&mut self, at: EntryRef, leaf: Entry) {
        let pages = self.leaf_pages(at);
        self.counts.add(size_class(pages), 1);
        if pages == 1 {
            self.frames.entry(leaf.frame()).or_default().push(at);
            return;
        }
        for block in blocks_of(leaf.frame(), pages) {
            self.blocks.entry(block).or_default().push(at);
        }
    }

    fn unmap_back(&mut self, at: EntryRef, leaf: Entry) {
        let pages = self.leaf_pages(at);
        self.counts.add(size_class(pages), -1);
        if pages == 1 {
            remove(&mut self.frames, &leaf.frame(), at);
            return;
        }
        for block in blocks_of(leaf.frame(), pages) {
            remove(&mut self.blocks, &block, at);
        }
    }

    /// No leaf takes writes to the frame any more. Large leaves around it go.
    pub(super) fn refuse_writes(&mut self, frame: Hfn) {
        for at in self.frames.get(&frame).into_iter().flatten() {
            let cell = self.page(at.page).memory.entry(at.index);
            let leaf = Entry(cell.load(Ordering::Relaxed));
            cell.store(leaf.refuse_writes().0, Ordering::SeqCst);
        }
        let large = self.blocks.get(&block_of(frame)).cloned();
        for at in large.into_iter().flatten() {
            self.clear(at);
        }
    }

    /// Takes a page away that nothing links to.
    pub(super) fn retire(&mut self, id: PageId) {
        let page = *self.page(id);
        for index in 0..page.memory.len() {
            self.clear(EntryRef { page: id, index });
        }
        self.by_key.remove(&page.key);
        self.by_address.remove(&page.memory.address());
        self.pages[id] = None;
        self.vacant.push(id);
        self.arena.retire(page.memory);
        self.zapped += 1;
    }

    /// Takes everything away.
    pub(super) fn clear_all(&mut self) {
        let ids: Vec<_> = self.by_key.values().copied().collect();
        for id in &ids {
            let memory = self.page(*id).memory;
            for index in 0..memory.len() {
                self.clear(EntryRef { page: *id, index });
            }
            self.arena.retire(memory);
        }
        self.pages.clear();
        self.vacant.clear();
        self.by_key.clear();
        self.by_address.clear();
        self.tables.clear();
        self.unsync.clear();
        self.settling.clear();
        self.protected_blocks.clear();
        self.roots.clear();
        self.zapped += ids.len() as u64;
    }
}

pub(super) fn block_of(frame: Hfn) -> u64 {
    frame.number() >> BLOCK_SHIFT
}

fn blocks_of(first: Hfn, pages: u64) -> std::ops::RangeInclusive<u64> {
    block_of(first)..=block_of(Hfn::new(first.number() + pages - 1))
}

/// The level under which a leaf of so many frames is counted.
fn size_class(pages: u64) -> u8 {
    if pages == 1 { 1 } else { 2 }
}

fn remove<K: Hash + Eq>(map: &mut NumberMap<K, Vec<EntryRef>>, key: &K, at: EntryRef) {
    if let Some(list) = map.get_mut(key) {
        list.retain(|e| *e != at);
        if list.is_empty() {
            map.remove(key);
        }
    }
}
