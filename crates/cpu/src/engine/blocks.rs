//! Translated blocks and the pages that they stand on.
//!
//! A code page is a guest virtual page, the host page that it led to, and everything else that its
//! translations depend on ([`PageKey`]); it has a number that is never used twice until the cache is
//! emptied. The instruction TLB of the frame maps a guest page to that number. A block may be entered
//! from elsewhere only where the instruction TLB holds the number of its page: so a change of address
//! space, of the guest's tables or of the host page needs no search for jumps that lead to the block.
//!
//! | entry | checks | who comes |
//! |---|---|---|
//! | plain | nothing | jumps within a page, and the two below |
//! | checked | the page | jumps from other pages |
//! | indirect | RIP is the block's, the page, `go` | the table of indirect jumps (`engine::jumps`) |
//!
//! Calls come [`crate::translate::DROP`] bytes in front of the first two.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use addr::{Gvn, Hfn};

use crate::translate::{Landing, Mode, PageCheck};

/// Everything that the translations on a page depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageKey {
    pub(crate) gvn: Gvn,
    pub(crate) host: Hfn,
    pub(crate) context: CodeContext,
}

/// What translations depend on besides where the code lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct CodeContext {
    pub(crate) mode: Mode,
    pub(crate) cs_base: u64,
    pub(crate) cs_limit: u32,
}

/// A page with translated code.
#[derive(Debug)]
pub(crate) struct CodePage {
    pub(crate) key: PageKey,
    /// Which chunks of 64 bytes are translated, and what they held.
    pub(crate) chunks: u64,
    pub(crate) copy: Box<[u8; 4096]>,
    /// When the bytes were last found unchanged.
    pub(crate) verified: u64,
    pub(crate) blocks: Vec<u32>,
    /// Where calls on it return to, by their offset in the page.
    landings: Vec<(u16, Landing)>,
    /// Its translations are void.
    pub(crate) dead: bool,
}

impl CodePage {
    /// The landing at an offset.
    pub(crate) fn landing(&self, offset: u16) -> Option<Landing> {
        let found = self.landings.iter().find(|(at, _)| *at == offset);
        found.map(|(_, landing)| *landing)
    }

    pub(crate) fn add_landing(&mut self, offset: u16, landing: Landing) {
        self.landings.push((offset, landing));
    }
}

/// A translated block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) rip: u64,
    /// Offset of the plain entry.
    pub(crate) plain: u32,
    /// End of its code.
    pub(crate) end: u32,
    /// First of its marks.
    pub(crate) marks: u32,
    pub(crate) page: u32,
    /// The page of its last byte, where that is another.
    pub(crate) second: Option<u32>,
    /// Offset of the checked entry, once made.
    pub(crate) checked: Option<u32>,
    pub(crate) indirect: Option<Indirect>,
}

/// A block's entry for indirect jumps: see `engine::jumps`. Where a call returns to the block, it is
/// that call's landing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Indirect {
    /// Its offset.
    pub(crate) entry: u32,
    /// Offset of the displacement of the jump to the next block.
    pub(crate) next: u32,
}

impl Block {
    /// Where on its page it begins.
    pub(crate) fn offset(&self, page: &CodePage) -> u16 {
        (self.rip.wrapping_add(page.key.context.cs_base) & 0xfff) as u16
    }
}

/// A fast hash for keys that the guest can't profit from attacking: its own blocks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 29;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type Words = BuildHasherDefault<WordHasher>;

/// All that is translated in one vCPU.
#[expect(
    clippy::struct_field_names,
    reason = "the blocks of the blocks' tables"
)]
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    pub(crate) pages: Vec<CodePage>,
    by_key: HashMap<PageKey, u32, Words>,
    by_host: HashMap<Hfn, Vec<u32>, Words>,
    pub(crate) blocks: Vec<Block>,
    by_place: HashMap<(u32, u16), u32, Words>,
}

impl Blocks {
    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The page with this key, made where it isn't there. Numbers begin with 1.
    pub(crate) fn page(&mut self, key: PageKey, now: u64) -> u32 {
        if let Some(id) = self.by_key.get(&key) {
            return *id;
        }
        self.pages.push(CodePage {
            key,
            chunks: 0,
            copy: Box::new([0; 4096]),
            verified: now,
            blocks: Vec::new(),
            landings: Vec::new(),
            dead: false,
        });
        let id = self.pages.len() as u32;
        self.by_key.insert(key, id);
        self.by_host.entry(key.host).or_default().push(id);
        id
    }

    /// A page by its number.
    pub(crate) fn page_ref(&self, id: u32) -> Option<&CodePage> {
        self.pages.get((id as usize).wrapping_sub(1))
    }

    pub(crate) fn page_mut(&mut self, id: u32) -> Option<&mut CodePage> {
        self.pages.get_mut((id as usize).wrapping_sub(1))
    }

    /// The block at an offset of a page.
    pub(crate) fn find(&self, page: u32, offset: u16) -> Option<u32> {
        self.by_place.get(&(page, offset)).copied()
    }

    pub(crate) fn insert(&mut self, offset: u16, block: Block) -> u32 {
        let number = self.blocks.len() as u32;
        self.blocks.push(block);
        self.by_place.insert((block.page, offset), number);
        for page in [Some(block.page), block.second].into_iter().flatten() {
            if let Some(page) = self.page_mut(page) {
                page.blocks.push(number);
            }
        }
        number
    }

    /// Takes the pages on this host page out of all tables; what was removed.
    pub(crate) fn remove_host_page(&mut self, host: Hfn) -> Removed {
        let mut removed = Removed::default();
        for id in self.by_host.remove(&host).unwrap_or_default() {
            let Some(page) = self.pages.get_mut(id as usize - 1) else {
                continue;
            };
            page.dead = true;
            page.chunks = 0;
            let key = page.key;
            let blocks = std::mem::take(&mut page.blocks);
            self.by_key.remove(&key);
            for number in &blocks {
                let block = &self.blocks[*number as usize];
                let offset = block.offset(&self.pages[block.page as usize - 1]);
                self.by_place.remove(&(block.page, offset));
            }
            removed.blocks.extend(blocks);
            removed.pages.push((key.gvn, id));
        }
        removed
    }

    /// The block whose code holds this offset of the cache.
    pub(crate) fn block_at(&self, offset: u32) -> Option<&Block> {
        // Where new code runs into more of it, the one before the last is asked for.
        if let [.., before, last] = &self.blocks[..]
            && (before.plain..last.plain).contains(&offset)
        {
            return Some(before).filter(|b| offset < b.end);
        }
        let next = self.blocks.partition_point(|b| b.plain <= offset);
        self.blocks[..next].last().filter(|b| offset < b.end)
    }
}

/// What a page of the host has no more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Removed {
    /// Numbers of blocks.
    pub(crate) blocks: Vec<u32>,
    /// The guest's pages that lay there, and their numbers.
    pub(crate) pages: Vec<(Gvn, u32)>,
}

/// The check of a page.
pub(crate) fn check_of(gvn: Gvn, id: u32) -> PageCheck {
    PageCheck {
        index: super::tlb::code_index(gvn) as u32,
        id,
    }
}
