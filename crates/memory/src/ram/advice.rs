//! What the host is told about the mapping: huge pages, merging, nodes, core dumps, prefaulting.
#![expect(unsafe_code, reason = "madvise and mbind on our own mapping")]

use std::io;

use addr::{Address, Hva, PageSize};

use super::{Backing, Dump, GuestRam, Ksm, Numa, NumaPolicy, RamConfig, RamError, Thp};
use crate::access;

/// How far prefaulting has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefault {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Bytes prefaulted between two reports.
const PREFAULT_STEP: u64 = 64 << 20;

pub(super) fn apply(
    ram: &GuestRam,
    config: &RamConfig,
    progress: impl FnMut(Prefault),
) -> Result<(), RamError> {
    // The policy first: it decides where the pages that later steps allocate come from.
    if let Some(numa) = &config.numa {
        bind(ram, numa).map_err(|source| RamError::Option {
            option: "the NUMA nodes",
            source,
        })?;
    }
    if config.dump == Dump::Exclude {
        advise(ram, libc::MADV_DONTDUMP, "keeping it out of core dumps")?;
    }
    let huge = matches!(config.backing, Backing::HugeTlb(_));
    match config.thp {
        // A host without transparent huge pages, or a file system without them, is no error.
        Thp::Advise if !huge => drop(advise(ram, libc::MADV_HUGEPAGE, "huge pages")),
        Thp::Never if !huge => drop(advise(ram, libc::MADV_NOHUGEPAGE, "no huge pages")),
        _ => {}
    }
    if config.ksm == Ksm::Mergeable {
        advise(ram, libc::MADV_MERGEABLE, "merging of equal pages")?;
    }
    if config.prefault {
        prefault(ram, progress)?;
    }
    Ok(())
}

pub(super) fn discard(ram: &GuestRam, offset: u64, len: u64) -> Result<(), RamError> {
    let page = ram.page_bytes();
    let whole = offset.is_multiple_of(page) && len.is_multiple_of(page);
    let inside = offset.checked_add(len).is_some_and(|end| end <= ram.size());
    if !whole || !inside {
        return Err(RamError::Size { size: len, page });
    }
    // Shared memory is freed in the file, private memory in the mapping.
    let advice = if ram.mapping().flags() & libc::MAP_SHARED != 0 {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    madvise(ram.hva().wrapping_add(offset), len, advice).map_err(|source| RamError::Option {
        option: "giving pages back",
        source,
    })
}

fn advise(ram: &GuestRam, advice: libc::c_int, option: &'static str) -> Result<(), RamError> {
    madvise(ram.hva(), ram.size(), advice).map_err(|source| RamError::Option { option, source })
}

fn madvise(start: Hva, len: u64, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is inside a mapping of guest memory, to which no Rust reference exists; the
    // advices used here never unmap.
    let result = unsafe { libc::madvise(start.raw() as *mut libc::c_void, len as usize, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn prefault(ram: &GuestRam, mut progress: impl FnMut(Prefault)) -> Result<(), RamError> {
    let total = ram.size();
    let mut done = 0;
    while done < total {
        let step = PREFAULT_STEP.max(ram.page_bytes()).min(total - done);
        populate(ram.hva().wrapping_add(done), step).map_err(|source| RamError::Option {
            option: "prefaulting",
            source,
        })?;
        done += step;
        progress(Prefault { done, total });
    }
    Ok(())
}

fn populate(start: Hva, len: u64) -> io::Result<()> {
    match madvise(start, len, libc::MADV_POPULATE_WRITE) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => touch(start, len),
        result => result,
    }
}

/// Touches every page, for kernels before 5.14, and leaves what is there.
fn touch(start: Hva, len: u64) -> io::Result<()> {
    (0..len)
        .step_by(PageSize::Size4K.bytes() as usize)
        .try_for_each(|offset| {
            access::compare_exchange(start.wrapping_add(offset), 0_u8, 0)
                .map(drop)
                .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))
        })
}

fn bind(ram: &GuestRam, numa: &Numa) -> io::Result<()> {
    const BITS: u8 = 64;
    if numa.nodes.is_empty() || numa.nodes.iter().any(|n| *n >= BITS) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mask = numa.nodes.iter().fold(0_u64, |mask, node| mask | 1 << node);
    let policy = match numa.policy {
        NumaPolicy::Bind => libc::MPOL_BIND,
        NumaPolicy::Interleave => libc::MPOL_INTERLEAVE,
        NumaPolicy::Preferred => libc::MPOL_PREFERRED,
    };
    // SAFETY: the range is our mapping, the mask is as long as it says (the kernel reads one bit
    // less than it is told).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            ram.hva().raw(),
            ram.size(),
            policy,
            &raw const mask,
            u64::from(BITS) + 1,
            0_u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
