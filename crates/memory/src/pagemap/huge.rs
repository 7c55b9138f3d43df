//! Which pages of this process the host keeps in huge frames, asked without privilege: `PAGEMAP_SCAN`
//! (Linux 6.7) and `PROCMAP_QUERY` (Linux 6.11) on the process's own files in `/proc`.
//!
//! Older hosts and processes without `/proc` answer "none": whoever asks goes on with small pages.
//! Each question opens its file anew, because programs close descriptors that they don't know.

#![expect(unsafe_code, reason = "an ioctl that fills a structure of ours")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use addr::{Address, Hva, HvaRange, PageSize};

use super::scan;

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// Ends these questions in this process for good: they are system calls that a filter may punish.
pub fn forbid_scans() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;

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
    if FORBIDDEN.load(Ordering::Relaxed) {
        return Vec::new();
    }
    File::open("/proc/self/pagemap")
        .and_then(|pagemap| scan::ranges(&pagemap, range, scan::Huge::OwnFrame))
        .unwrap_or_default()
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
    let answer = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
    (answer >= 0).then_some(query.vma_page_size)
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
