//! `PAGEMAP_SCAN` (Linux 6.7 and later): which ranges of a process are mapped by huge entries.
//!
//! It looks at no frame numbers, so the kernel answers everybody who may open `/proc/PID/pagemap`.
//! (`/proc/kpageflags`, which tells of frames, is for root alone.)

#![expect(unsafe_code, reason = "an ioctl with pointers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use addr::{Address, Hva, HvaRange, PageSize};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Its entry is present.
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Mapped by the kernel's page of zeros.
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Mapped by an entry for 2 MiB or more, or of hugetlbfs.
const PAGE_IS_HUGE: u64 = 1 << 6;
/// Ranges fetched at once.
const REGIONS: usize = 64;

/// Which huge entries are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Huge {
    /// Every one.
    Any,
    /// Those of frames of the process's own, not of the kernel's huge page of zeros, which the next
    /// write replaces.
    OwnFrame,
}

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

impl Scan {
    fn of(huge: Huge) -> Scan {
        let (mask, inverted) = match huge {
            Huge::Any => (PAGE_IS_HUGE, 0),
            Huge::OwnFrame => (
                PAGE_IS_HUGE | PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
                PAGE_IS_PFNZERO,
            ),
        };
        Scan {
            size: size_of::<Scan>() as u64,
            category_mask: mask,
            category_inverted: inverted,
            return_mask: PAGE_IS_HUGE,
            ..Scan::default()
        }
    }
}

/// The parts of `range` that are mapped huge, in order; an error where the kernel does not tell.
pub(super) fn ranges(pagemap: &File, range: HvaRange, huge: Huge) -> io::Result<Vec<HvaRange>> {
    let mut found = Vec::new();
    let mut at = range.start().align_down(PageSize::Size4K).raw();
    let end = range.end().raw().next_multiple_of(PageSize::Size4K.bytes());
    let mut regions = [Region::default(); REGIONS];
    while at < end {
        let scan = Scan {
            start: at,
            end,
            ..Scan::of(huge)
        };
        let (filled, walked) = call(pagemap, scan, &mut regions)?;
        let part = |r: &Region| HvaRange::between(Hva::new(r.start), Hva::new(r.end));
        found.extend(filled.iter().filter_map(part));
        if walked <= at {
            break;
        }
        at = walked;
    }
    Ok(found)
}

/// One call: the regions that it filled in, and how far it came.
fn call<'a>(
    pagemap: &File,
    mut scan: Scan,
    into: &'a mut [Region],
) -> io::Result<(&'a [Region], u64)> {
    scan.vec = into.as_mut_ptr() as u64;
    scan.vec_len = into.len() as u64;
    // SAFETY: the structure says how long it is and how many regions `into` has; both live for the
    // call, which writes nothing else.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    Ok((&into[..count.min(into.len())], scan.walk_end))
}
