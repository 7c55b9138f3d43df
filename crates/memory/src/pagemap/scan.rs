//! Which pages the host keeps in huge frames, asked without privilege: `PAGEMAP_SCAN` (Linux 6.7)
//! and `PROCMAP_QUERY` (Linux 6.11) on the process's own files in `/proc`.
//!
//! Older hosts and processes without `/proc` answer "none": whoever asks goes on with small pages.
//! Each question opens its file anew, because programs close descriptors that they don't know.

#![expect(unsafe_code, reason = "two ioctls that fill structures of ours")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use addr::{Address, Hva, HvaRange, PageSize};

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// Ends these questions in this process for good: they are system calls that a filter may punish.
pub fn forbid_scans() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

/// The size of the huge frame that holds a page of this process; none where the page is absent, small,
/// or the host does not tell.
pub fn huge_page_at(page: Hva) -> Option<PageSize> {
    let start = page.align_down(PageSize::Size4K);
    let range = HvaRange::new(start, PageSize::Size4K.bytes())?;
    huge_ranges(range).first()?;
    match mapping_page_size(page) {
        Some(bytes) if bytes == PageSize::Size1G.bytes() => Some(PageSize::Size1G),
        // A mapping of small pages that has a huge one: a transparent huge page.
        _ => Some(PageSize::Size2M),
    }
}

/// The parts of a range of this process's addresses that lie in huge frames, in order.
pub fn huge_ranges(range: HvaRange) -> Vec<HvaRange> {
    let mut found = Vec::new();
    if FORBIDDEN.load(Ordering::Relaxed) {
        return found;
    }
    let Ok(pagemap) = File::open("/proc/self/pagemap") else {
        return found;
    };
    let (mut start, end) = (range.start().raw(), range.end().raw());
    while start < end {
        let mut regions = [Region::default(); 32];
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start,
            end,
            regions: regions.as_mut_ptr() as u64,
            regions_len: regions.len() as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_HUGE | PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
            return_mask: PAGE_IS_HUGE,
            ..Scan::default()
        };
        // SAFETY: `scan` is a pm_scan_arg of its `size`; it names `regions` with its length.
        let count = unsafe { ioctl(&pagemap, PAGEMAP_SCAN, &raw mut scan) };
        let Some(regions) = usize::try_from(count).ok().and_then(|n| regions.get(..n)) else {
            return found;
        };
        let ranges = regions
            .iter()
            .filter_map(|region| HvaRange::between(Hva::new(region.start), Hva::new(region.end)));
        found.extend(ranges);
        if scan.walk_end <= start {
            return found;
        }
        start = scan.walk_end;
    }
    found
}

/// The size of the pages of the mapping around an address.
fn mapping_page_size(at: Hva) -> Option<u64> {
    let maps = File::open("/proc/self/maps").ok()?;
    let mut query = Query {
        size: size_of::<Query>() as u64,
        addr: at.raw(),
        ..Query::default()
    };
    // SAFETY: `query` is a procmap_query of its `size`, and asks for no name.
    let answer = unsafe { ioctl(&maps, PROCMAP_QUERY, &raw mut query) };
    (answer >= 0).then_some(query.vma_page_size)
}

/// # Safety
/// `argument` is what the request reads and writes.
unsafe fn ioctl<T>(file: &File, request: libc::c_ulong, argument: *mut T) -> libc::c_int {
    // SAFETY: the caller's.
    unsafe { libc::ioctl(file.as_raw_fd(), request, argument) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{GuestRam, RamConfig, Thp};

    fn ram(thp: Thp) -> GuestRam {
        let mut config = RamConfig::private(8 << 20);
        config.thp = thp;
        let ram = GuestRam::new(&config).unwrap();
        for page in 0..ram.size() / 4096 {
            let at = ram.range().start().wrapping_add(page * 4096);
            crate::access::store(at, 1, 8).unwrap();
        }
        ram
    }

    #[test]
    fn small_pages_are_not_huge() {
        let ram = ram(Thp::Never);
        assert_eq!(huge_ranges(ram.range()), []);
        assert_eq!(huge_page_at(ram.range().start()), None);
    }

    #[test]
    fn huge_ranges_hold_the_pages_that_are_said_to_be_huge() {
        let ram = ram(Thp::Advise);
        let huge = huge_ranges(ram.range());
        if huge.is_empty() {
            println!("SKIPPED: the host gave no huge page");
            return;
        }
        for range in huge {
            assert_eq!(huge_page_at(range.start()), Some(PageSize::Size2M));
            assert!(ram.range().contains(range.start()));
        }
    }

    #[test]
    fn addresses_of_nothing_are_not_huge() {
        assert_eq!(huge_page_at(Hva::new(0)), None);
        assert_eq!(huge_page_at(Hva::new(!0xfff)), None);
    }
}
