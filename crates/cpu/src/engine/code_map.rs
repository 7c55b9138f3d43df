//! Which bytes of guest memory hold code that some vCPU of the VM has translated.
//!
//! Shared by the vCPUs of a VM. Memory is named by its page in the monitor (the HVA), so that two
//! guest addresses of one page are one. A page's bits stand for chunks of 64 bytes.
//!
//! Invariants:
//! - While a page has bits, no vCPU has a write entry for it in its TLB: [`CodeMap::add`] says when
//!   others must flush, and a write entry is made only under [`CodeMap::is_clear`], by a vCPU that
//!   will pass a checkpoint after that flush is asked for.
//! - A write to such a page is made under the map's lock ([`CodeMap::write`]), and so is the reading
//!   of code bytes into a translation ([`CodeMap::add`] comes first): a translation never holds bytes
//!   older than the last write that the map has seen.
//! - Bytes are written first, then the page is logged, then the other vCPUs are asked to look.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use addr::{Address, Hfn, Hva, PageSize};

use super::blocks::WordHasher;

/// See the module.
#[derive(Debug, Default)]
pub struct CodeMap {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pages: HashMap<Hfn, u64, BuildHasherDefault<WordHasher>>,
    /// Pages whose translations are void, in order.
    log: Vec<Hfn>,
}

/// Bytes of a chunk.
const CHUNK: usize = 64;

/// The runs of bytes of a page that these chunks are.
pub(crate) fn runs(mut chunks: u64) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if chunks == 0 {
            return None;
        }
        let first = chunks.trailing_zeros();
        let count = (chunks >> first).trailing_ones();
        // All 64 of them would be too far to shift.
        chunks &= u64::MAX.checked_shl(first + count).unwrap_or(0);
        let (first, count) = (first as usize, count as usize);
        Some(first * CHUNK..(first + count) * CHUNK)
    })
}

/// The bits of the chunks that these bytes of one page touch.
pub(crate) fn chunks(offset: u64, len: u64) -> u64 {
    let first = offset >> 6 & 63;
    let last = (offset + len.max(1) - 1).min(4095) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

/// What a write to a page with code did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// Only data.
    Data,
    /// Translated bytes: the page's translations are void, and others must be told.
    Code,
}

impl CodeMap {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds translated chunks. Whether the page had none: then write entries must be flushed before
    /// the bytes are read.
    pub(crate) fn add(&self, page: Hfn, bits: u64) -> bool {
        let mut inner = self.lock();
        let entry = inner.pages.entry(page).or_insert(0);
        let first = *entry == 0;
        *entry |= bits;
        first
    }

    /// Whether a page holds no translated code.
    pub(crate) fn is_clear(&self, page: Hfn) -> bool {
        self.lock().pages.get(&page).is_none_or(|bits| *bits == 0)
    }

    /// Which of these pages hold no translated code.
    pub(crate) fn are_clear<const N: usize>(&self, pages: [Hfn; N]) -> [bool; N] {
        let inner = self.lock();
        pages.map(|page| inner.pages.get(&page).is_none_or(|bits| *bits == 0))
    }

    /// Does a write of `len` bytes within the page at `hva`, and voids the page's translations where
    /// it touches them.
    pub(crate) fn write<E>(
        &self,
        hva: Hva,
        len: u64,
        write: impl FnOnce() -> Result<(), E>,
    ) -> Result<Written, E> {
        let mut inner = self.lock();
        write()?;
        let page = hva.frame();
        let touched = chunks(hva.page_offset(PageSize::Size4K), len);
        let bits = inner.pages.get(&page).copied().unwrap_or(0);
        if bits & touched == 0 {
            return Ok(Written::Data);
        }
        inner.void(page);
        Ok(Written::Code)
    }

    /// Voids a page whose bytes were found changed.
    pub(crate) fn void(&self, page: Hfn) {
        self.lock().void(page);
    }

    /// The pages voided since the log was this long, and its length now.
    pub(crate) fn voided_since(&self, seen: usize) -> (Vec<Hfn>, usize) {
        let inner = self.lock();
        (
            inner.log[seen.min(inner.log.len())..].to_vec(),
            inner.log.len(),
        )
    }

    /// The length of the log.
    pub(crate) fn log_length(&self) -> usize {
        self.lock().log.len()
    }
}

impl Inner {
    fn void(&mut self, page: Hfn) {
        self.pages.remove(&page);
        self.log.push(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_bits() {
        assert_eq!(chunks(0, 1), 1);
        assert_eq!(chunks(63, 2), 3);
        assert_eq!(chunks(0, 4096), u64::MAX);
        assert_eq!(chunks(4095, 8), 1 << 63);
    }

    #[test]
    fn runs_of_chunks() {
        let runs = |chunks| runs(chunks).collect::<Vec<_>>();
        assert_eq!(runs(0), []);
        assert_eq!(runs(u64::MAX).first(), Some(&(0..4096)));
        assert_eq!(runs(1 << 63 | 0b1101), [0..64, 128..256, 4032..4096]);
    }

    #[test]
    fn writes_void_what_they_touch() {
        let map = CodeMap::default();
        let page = Hva::new(0x7000);
        assert!(map.add(page.frame(), 1));
        assert!(!map.add(page.frame(), 2));
        let write = |offset: u64| map.write(Hva::new(0x7000 + offset), 4, || Ok::<(), ()>(()));
        assert_eq!(write(0x100), Ok(Written::Data));
        assert!(!map.is_clear(page.frame()));
        assert_eq!(write(0x3e), Ok(Written::Code));
        assert!(map.is_clear(page.frame()));
        assert_eq!(map.voided_since(0), (vec![page.frame()], 1));
    }
}
