//! What fault-ahead asks of the host.

#![expect(
    unsafe_code,
    reason = "mincore and madvise on the program's memory; a thread's signal mask"
)]

use addr::{Hva, HvaRange};

use crate::pagemap::Pagemap;

/// Bytes of the smallest page.
pub(super) const PAGE: u64 = 4096;

/// What a mapping is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Writable memory that is nobody else's and no file's.
    Private,
    /// All else.
    Other,
}

/// Whether the host has a page there.
pub(super) fn is_resident(page: Hva) -> bool {
    let mut there = 0u8;
    // SAFETY: reads no memory; writes one byte for one page.
    let answer = unsafe { libc::mincore(page.raw() as *mut _, PAGE as usize, &raw mut there) };
    answer != 0 || there & 1 != 0
}

/// Provides the pages of a range, as writes would.
pub(super) fn populate(start: Hva, len: u64) {
    // SAFETY: provides pages that a write would provide, and changes no contents. A host that can't
    // (before Linux 5.14, or out of memory) leaves it to the write.
    unsafe {
        libc::madvise(
            start.raw() as *mut _,
            len as usize,
            libc::MADV_POPULATE_WRITE,
        )
    };
}

/// The mapping around an address.
pub(super) fn mapping(at: Hva) -> Option<(HvaRange, Kind)> {
    let mapping = Pagemap::of_self().ok()?.mapping(at).ok()??;
    let plain = !mapping.is_file() && !mapping.permissions.shared && mapping.permissions.write;
    let kind = if plain { Kind::Private } else { Kind::Other };
    Some((mapping.range, kind))
}

/// Blocks all signals in this thread until dropped: a thread that is started meanwhile never runs a
/// handler of the program's.
pub(super) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(super) fn all() -> Self {
        // SAFETY: plain data, filled by sigfillset; the mask of this thread alone.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: a mask that pthread_sigmask gave.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut());
        }
    }
}
