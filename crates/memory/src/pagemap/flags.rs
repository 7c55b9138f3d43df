//! One word of `/proc/kpageflags`.
#![expect(missing_docs, reason = "the kernel's names")]

bitflags::bitflags! {
    /// What the kernel says about a frame (`include/uapi/linux/kernel-page-flags.h`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PageFlags: u64 {
        const LOCKED = 1 << 0;
        const ERROR = 1 << 1;
        const REFERENCED = 1 << 2;
        const UPTODATE = 1 << 3;
        const DIRTY = 1 << 4;
        const LRU = 1 << 5;
        const ACTIVE = 1 << 6;
        const SLAB = 1 << 7;
        const WRITEBACK = 1 << 8;
        const RECLAIM = 1 << 9;
        const BUDDY = 1 << 10;
        const MMAP = 1 << 11;
        const ANON = 1 << 12;
        const SWAPCACHE = 1 << 13;
        const SWAPBACKED = 1 << 14;
        const COMPOUND_HEAD = 1 << 15;
        const COMPOUND_TAIL = 1 << 16;
        /// Of hugetlbfs.
        const HUGE = 1 << 17;
        const UNEVICTABLE = 1 << 18;
        const HWPOISON = 1 << 19;
        const NOPAGE = 1 << 20;
        /// Merged with equal pages.
        const KSM = 1 << 21;
        /// Of a transparent huge page.
        const THP = 1 << 22;
        const OFFLINE = 1 << 23;
        /// The page of zeroes that all reads of untouched memory share.
        const ZERO_PAGE = 1 << 24;
        const IDLE = 1 << 25;
        const PGTABLE = 1 << 26;
    }
}
