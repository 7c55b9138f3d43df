//! Memory of shadow pages: entries, and behind them the guest's entries that they were made from.
//!
//! As with the second level's tables: the memory of a page that was taken away is used again only
//! after all readers have passed a checkpoint, and goes back to the host only when everything is
//! dropped. A reader without a lock may read what is stale, never what is not there.

#![expect(
    unsafe_code,
    reason = "links hold addresses of pages, which live as long as the shadow tables"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::atomic::{AtomicU64, Ordering};

/// The memory of one shadow page.
///
/// Invariant: `base` points to `2 * len` atomics, aligned to 4 KiB, of an [`Arena`] that outlives
/// this value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageMemory {
    base: *const AtomicU64,
    len: usize,
}

// SAFETY: atomics, see the type's invariant.
unsafe impl Send for PageMemory {}
// SAFETY: as above.
unsafe impl Sync for PageMemory {}

impl PageMemory {
    /// The page that a link leads to, with `len` entries.
    ///
    /// # Safety
    /// The address is that of a page with so many entries, of an arena that outlives the result.
    pub(super) unsafe fn from_address(address: u64, len: usize) -> Self {
        Self {
            base: address as *const AtomicU64,
            len,
        }
    }

    pub(super) fn address(self) -> u64 {
        self.base as u64
    }

    pub(super) fn len(self) -> usize {
        self.len
    }

    /// An entry.
    #[inline]
    pub(super) fn entry<'a>(self, index: usize) -> &'a AtomicU64 {
        // SAFETY: the type's invariant; the index is taken modulo `len`.
        unsafe { &*self.base.add(index % self.len) }
    }

    /// The guest's entry that an entry was made from.
    #[inline]
    pub(super) fn guest<'a>(self, index: usize) -> &'a AtomicU64 {
        // SAFETY: as above; the second half.
        unsafe { &*self.base.add(self.len + index % self.len) }
    }

    fn clear(self) {
        for index in 0..self.len {
            self.entry(index).store(0, Ordering::Relaxed);
            self.guest(index).store(0, Ordering::Relaxed);
        }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(2 * len * size_of::<AtomicU64>(), 4096)
            .expect("a few pages at most")
    }
}

/// Where the memory of shadow pages comes from.
#[derive(Default)]
pub(super) struct Arena {
    all: Vec<PageMemory>,
    free: Vec<PageMemory>,
    /// Taken away, not yet known to be out of every reader's hands.
    limbo: Vec<PageMemory>,
}

impl Arena {
    /// A page of empty entries.
    pub(super) fn take(&mut self, len: usize) -> PageMemory {
        if let Some(at) = self.free.iter().rposition(|page| page.len == len) {
            return self.free.swap_remove(at);
        }
        let layout = PageMemory::layout(len);
        // SAFETY: the layout is not empty; zero bytes are valid atomics.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        let page = PageMemory {
            base: base.cast(),
            len,
        };
        self.all.push(page);
        page
    }

    /// Takes a page back that readers may still hold.
    pub(super) fn retire(&mut self, page: PageMemory) {
        self.limbo.push(page);
    }

    /// What is in limbo now. To be given to [`Arena::recycle`] after readers have passed.
    pub(super) fn take_limbo(&mut self) -> Vec<PageMemory> {
        std::mem::take(&mut self.limbo)
    }

    /// No reader holds these any more.
    pub(super) fn recycle(&mut self, pages: Vec<PageMemory>) {
        for page in pages {
            page.clear();
            self.free.push(page);
        }
    }

    /// Bytes of pages in use.
    pub(super) fn bytes_in_use(&self) -> usize {
        let bytes = |pages: &[PageMemory]| -> usize {
            pages.iter().map(|p| PageMemory::layout(p.len).size()).sum()
        };
        bytes(&self.all) - bytes(&self.free) - bytes(&self.limbo)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for page in &self.all {
            // SAFETY: allocated in `take` with this layout; `PageMemory`s don't outlive the arena.
            unsafe { dealloc(page.base.cast_mut().cast(), PageMemory::layout(page.len)) };
        }
    }
}
