//! Memory for the tables of the second level.
//!
//! Tables are handed out and taken back, but their memory goes back to the host only when the pool
//! is dropped. So a reader that holds a stale reference to a table reads a stale or foreign entry,
//! never freed memory. That such a reader does not *act* on it is not the pool's promise: whoever
//! takes a table away waits for all readers before it gives the table back (`quiesce`).

#![expect(
    unsafe_code,
    reason = "entries hold addresses of tables, which live as long as the pool"
)]

use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memory::sync::Mutex;

use super::entry::{ENTRIES, Entry};

/// One table: a page of entries.
#[repr(C, align(4096))]
pub(crate) struct Table {
    entries: [AtomicU64; ENTRIES],
}

/// Tables allocated at a time.
const CHUNK: usize = 16;

type Chunk = [Table; CHUNK];

/// Where tables come from.
#[derive(Default)]
pub(crate) struct Pool {
    inner: Mutex<Inner>,
    in_use: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    /// Owned: made by `Box::into_raw`, given back in `Drop`.
    chunks: Vec<*mut Chunk>,
    free: Vec<TableRef>,
}

// SAFETY: the pointers are owned boxes of atomics.
unsafe impl Send for Inner {}

/// The address of a table of a pool.
///
/// Invariant: it points to a table of a pool that outlives this value; only this module makes one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TableRef(*const Table);

// SAFETY: a table is an array of atomics.
unsafe impl Send for TableRef {}
// SAFETY: as above.
unsafe impl Sync for TableRef {}

impl TableRef {
    /// The table that an entry of the second level leads to.
    ///
    /// # Safety
    /// `address` is that of a table of a pool that outlives the result.
    pub(crate) unsafe fn from_address(address: u64) -> Self {
        Self(address as *const Table)
    }

    /// For an entry that leads here.
    pub(crate) fn address(self) -> u64 {
        self.0 as u64
    }

    /// The `index`th entry; the index is taken modulo the table's size.
    #[inline]
    pub(crate) fn cell<'a>(self, index: usize) -> &'a AtomicU64 {
        // SAFETY: the type's invariant: the memory lives until the pool is dropped, which nobody
        // does while he walks its tables (the second level owns the pool and hands out no cell
        // that outlives a borrow of itself).
        unsafe { &(&(*self.0).entries)[index % ENTRIES] }
    }
}

impl Pool {
    /// Puts `count` empty tables into `into`.
    pub(crate) fn take(&self, count: usize, into: &mut Vec<TableRef>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        while inner.free.len() < count {
            inner.grow();
        }
        let rest = inner.free.len() - count;
        into.extend(inner.free.drain(rest..));
        self.in_use.fetch_add(count, Ordering::Relaxed);
    }

    /// Takes tables back. Nobody reads them any more.
    pub(crate) fn give_back(&self, tables: impl IntoIterator<Item = TableRef>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        for table in tables {
            for index in 0..ENTRIES {
                table.cell(index).store(Entry::EMPTY.0, Ordering::Relaxed);
            }
            inner.free.push(table);
            self.in_use.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Bytes of the tables in use.
    pub(crate) fn bytes_in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed) * size_of::<Table>()
    }
}

impl Inner {
    fn grow(&mut self) {
        let chunk: Box<Chunk> = Box::new(std::array::from_fn(|_| Table {
            entries: [const { AtomicU64::new(Entry::EMPTY.0) }; ENTRIES],
        }));
        let chunk = Box::into_raw(chunk);
        self.chunks.push(chunk);
        for index in 0..CHUNK {
            // SAFETY: within the allocation just made.
            self.free
                .push(TableRef(unsafe { (&raw const (*chunk)[index]).cast() }));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        for chunk in inner.chunks.drain(..) {
            // SAFETY: made by `Box::into_raw`; `TableRef`s don't outlive the pool.
            drop(unsafe { Box::from_raw(chunk) });
        }
    }
}
