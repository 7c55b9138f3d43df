//! Huge pages of a process, without a look at frame numbers: `PAGEMAP_SCAN` (Linux 6.7 and later).
//!
//! The kernel says of ranges whether they are mapped by one entry for 2 MiB or more, to everybody
//! who may open `/proc/PID/pagemap`. (`/proc/kpageflags`, which tells of frames, is for root alone.)
#![expect(unsafe_code, reason = "an ioctl with pointers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use addr::{Hva, HvaRange};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Mapped by an entry for a huge page, or of hugetlbfs.
const PAGE_IS_HUGE: u64 = 1 << 6;
/// Ranges fetched at once.
const REGIONS: usize = 512;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The parts of `range` that are mapped huge, in order; an error where the kernel does not tell.
pub(super) fn ranges(pagemap: &File, range: HvaRange) -> io::Result<Vec<HvaRange>> {
    const PAGE: u64 = 0x1000;
    let mut found = Vec::new();
    let mut at = range.start().raw() & !(PAGE - 1);
    let end = range.end().raw().next_multiple_of(PAGE);
    let mut regions = [Region::default(); REGIONS];
    while at < end {
        let (count, walked) = scan(pagemap, at, end, &mut regions)?;
        let part = |r: &Region| HvaRange::between(Hva::new(r.start), Hva::new(r.end));
        found.extend(regions[..count].iter().filter_map(part));
        if walked <= at {
            break;
        }
        at = walked;
    }
    Ok(found)
}

/// One call: how many regions it filled in, and how far it came.
fn scan(pagemap: &File, start: u64, end: u64, into: &mut [Region]) -> io::Result<(usize, u64)> {
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start,
        end,
        vec: into.as_mut_ptr() as u64,
        vec_len: into.len() as u64,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..Scan::default()
    };
    // SAFETY: the structure says how long it is and how many regions `into` has; both live for the
    // call, which writes nothing else.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    Ok((count.min(into.len()), scan.walk_end))
}
