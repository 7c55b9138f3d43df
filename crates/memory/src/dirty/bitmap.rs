//! A bit per page, set by vCPUs in parallel, harvested by one reader at a time.
//!
//! A second level holds one bit per 64 words (4096 pages, 16 MiB): harvesting looks at 1/64 of the
//! words where a slot is mostly clean. A bit of the second level may be set over words that are all
//! zero; it is never clear over a word that is not, once [`DirtyBitmap::mark`] has returned.
//!
//! | step of `mark` | step of a harvest | why the page is not lost                                  |
//! |----------------|-------------------|-----------------------------------------------------------|
//! | set the bit    |                   |                                                           |
//! | set the summary| clear the summary | summary last: a harvest that clears it finds the bit, and |
//! |                | take the words    | one that came before it leaves the summary to the next    |
#![cfg_attr(
    not(loom),
    expect(
        unsafe_code,
        reason = "zeroed memory from the allocator, so that a clean bitmap costs nothing"
    )
)]

use crate::sync::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::alloc::{Layout, alloc_zeroed};

const WORD_BITS: u64 = 64;

/// No memory for a bitmap of this many pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for the dirty bitmap of {0} pages")]
pub struct NoMemory(pub u64);

/// 64 pages of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyWord {
    /// Which word: page `64 * index` of the slot is bit 0.
    pub index: usize,
    /// The pages.
    pub mask: u64,
}

/// The dirty bitmap of one slot.
pub struct DirtyBitmap {
    pages: u64,
    words: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

impl DirtyBitmap {
    /// A clean bitmap.
    pub fn new(pages: u64) -> Result<Self, NoMemory> {
        let words = pages.div_ceil(WORD_BITS);
        Ok(Self {
            pages,
            words: zeroed(words).ok_or(NoMemory(pages))?,
            summary: zeroed(words.div_ceil(WORD_BITS)).ok_or(NoMemory(pages))?,
        })
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The number of words that a harvest fills.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// Marks a page; any thread, any time. Returns whether it was clean.
    ///
    /// Who is not in guest mode, where harvests wait for it, writes to the page *before* this.
    ///
    /// A page outside the slot is ignored.
    #[inline]
    pub fn mark(&self, page: u64) -> bool {
        if page >= self.pages {
            return false;
        }
        let index = (page / WORD_BITS) as usize;
        let bit = 1 << (page % WORD_BITS);
        // No load first, to spare pages that are dirty already: it could be done before the write to
        // the page that it is for, and a harvest in between would have neither the write nor the mark.
        let was_clean = self.words[index].fetch_or(bit, Ordering::AcqRel) & bit == 0;
        self.summarise(index);
        was_clean
    }

    /// Marks every page.
    pub fn mark_all(&self) {
        for (index, word) in self.words.iter().enumerate() {
            word.fetch_or(self.valid(index), Ordering::AcqRel);
            self.summarise(index);
        }
    }

    /// Whether a page is marked.
    pub fn is_marked(&self, page: u64) -> bool {
        page < self.pages
            && self.words[(page / WORD_BITS) as usize].load(Ordering::Acquire)
                & (1 << (page % WORD_BITS))
                != 0
    }

    /// Takes all marks: the words that were not zero, in order.
    pub fn take(&self) -> Vec<DirtyWord> {
        let mut taken = Vec::new();
        for (index, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Acquire) != 0 {
                self.take_group(index, summary.swap(0, Ordering::AcqRel), &mut taken);
            }
        }
        taken
    }

    fn take_group(&self, group: usize, mut summary: u64, taken: &mut Vec<DirtyWord>) {
        while summary != 0 {
            let index = group * WORD_BITS as usize + summary.trailing_zeros() as usize;
            summary &= summary - 1;
            let mask = self.words[index].swap(0, Ordering::AcqRel);
            if mask != 0 {
                taken.push(DirtyWord { index, mask });
            }
        }
    }

    /// The marks as they are now, without taking them; `into[i]` is word `i`.
    pub fn copy_to(&self, into: &mut [u64]) {
        for (to, word) in into.iter_mut().zip(&self.words) {
            *to = word.load(Ordering::Acquire);
        }
    }

    /// Clears pages of one word. Returns those that were marked.
    pub fn clear(&self, index: usize, mask: u64) -> u64 {
        let Some(word) = self.words.get(index).filter(|_| mask != 0) else {
            return 0;
        };
        word.fetch_and(!mask, Ordering::AcqRel) & mask
    }

    fn summarise(&self, index: usize) {
        let bit = 1 << (index as u64 % WORD_BITS);
        let summary = &self.summary[index / WORD_BITS as usize];
        // Ordered behind the word's bit by the same location's read-modify-write rule of x86; on the
        // language's level by AcqRel on both.
        if summary.load(Ordering::Acquire) & bit == 0 {
            summary.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// The bits of a word that stand for pages of the slot.
    fn valid(&self, index: usize) -> u64 {
        let behind = self.pages - index as u64 * WORD_BITS;
        if behind >= WORD_BITS {
            u64::MAX
        } else {
            (1 << behind) - 1
        }
    }

    /// Panics where a mark has no summary or lies outside the slot. For quiet moments: no thread
    /// marks meanwhile.
    pub fn check_invariants(&self) {
        for (index, word) in self.words.iter().enumerate() {
            let word = word.load(Ordering::SeqCst);
            assert_eq!(word & !self.valid(index), 0, "marks behind the slot's end");
            let summary = self.summary[index / 64].load(Ordering::SeqCst);
            assert!(
                word == 0 || summary >> (index % 64) & 1 == 1,
                "word {index} has no summary"
            );
        }
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

#[cfg(loom)]
fn zeroed(len: u64) -> Option<Box<[AtomicU64]>> {
    Some((0..len).map(|_| AtomicU64::new(0)).collect())
}

/// `len` zero words that cost no memory until they are touched, or `None` without memory.
#[cfg(not(loom))]
fn zeroed(len: u64) -> Option<Box<[AtomicU64]>> {
    let len = usize::try_from(len).ok()?;
    if len == 0 {
        return Some(Box::default());
    }
    let layout = Layout::array::<AtomicU64>(len).ok()?;
    // SAFETY: the layout is not empty; all-zero bytes are a valid `AtomicU64`; a box of a slice is
    // freed with the layout of that slice, which this is.
    unsafe {
        #[expect(clippy::cast_ptr_alignment, reason = "the layout has the alignment")]
        let start = alloc_zeroed(layout).cast::<AtomicU64>();
        (!start.is_null()).then(|| Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, len)))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn marks_are_taken_once() {
        let bitmap = DirtyBitmap::new(10_000).unwrap();
        assert!(bitmap.mark(0) && bitmap.mark(63) && bitmap.mark(9_999));
        assert!(!bitmap.mark(63), "already dirty");
        assert!(!bitmap.mark(10_000), "outside");
        bitmap.check_invariants();
        let taken = bitmap.take();
        let first = DirtyWord {
            index: 0,
            mask: 1 | 1 << 63,
        };
        let last = DirtyWord {
            index: 156,
            mask: 1 << 15,
        };
        assert_eq!(taken, [first, last]);
        assert_eq!(bitmap.take(), []);
    }

    #[test]
    fn mark_all_stops_at_the_end() {
        let bitmap = DirtyBitmap::new(65).unwrap();
        bitmap.mark_all();
        bitmap.check_invariants();
        let mut words = [0; 2];
        bitmap.copy_to(&mut words);
        assert_eq!(words, [u64::MAX, 1]);
        assert_eq!(bitmap.clear(1, u64::MAX), 1);
        assert_eq!(bitmap.clear(1, u64::MAX), 0);
        assert_eq!(bitmap.clear(2, 1), 0, "no such word");
    }

    #[test]
    fn empty_bitmap() {
        let bitmap = DirtyBitmap::new(0).unwrap();
        assert!(!bitmap.mark(0));
        assert_eq!(bitmap.take(), []);
    }
}
