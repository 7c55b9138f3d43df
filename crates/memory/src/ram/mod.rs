//! Guest RAM: memory that the monitor allocates in its own address space, like any memory of its
//! own. A guest sees it once a memory slot names it.
//!
//! | backing                  | shareable with other processes | swappable | pages                |
//! |--------------------------|--------------------------------|-----------|----------------------|
//! | [`Backing::Memfd`]       | by its file descriptor         | yes       | 4 KiB, THP on advice |
//! | [`Backing::Anonymous`]   | no                             | yes       | 4 KiB, THP on advice |
//! | [`Backing::HugeTlb`]     | by its file descriptor         | no        | 2 MiB or 1 GiB       |
//! | [`Backing::File`]        | by its path                    | to itself | the file system's    |
//!
//! Nothing is allocated before it is touched, but for huge pages, which the host reserves at once
//! (an absent huge page is an error here, not a `SIGBUS` later). The mapping is a vm-memory
//! [`MmapRegion`], so that virtqueues and loaders of the rust-vmm family work on it:
//!
//! ```
//! use addr::Gpa;
//! use memory::ram::{GuestRam, RamConfig, guest_memory};
//! use vm_memory::{Bytes, GuestAddress};
//!
//! let ram = GuestRam::new(&RamConfig::new(16 << 20))?;
//! let view = guest_memory(&[(Gpa::new(0x10_0000), &ram)])?;
//! view.write_obj(0x4433_2211_u32, GuestAddress(0x10_0000))?;
//! assert_eq!(memory::access::load(ram.hva(), 4)?, 0x4433_2211);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod advice;
mod config;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use addr::{Gpa, Hva, HvaRange};
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

pub use advice::Prefault;
pub use config::{Backing, Dump, HugePage, Ksm, Numa, NumaPolicy, RamConfig, Sharing, Thp};

use crate::access;

/// Why there is no RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Zero, not whole pages of the backing, or more than an address space holds.
    #[error("{size:#x} bytes of RAM are not a number of pages of {page:#x} bytes")]
    Size {
        /// Bytes asked for.
        size: u64,
        /// The backing's page.
        page: u64,
    },
    /// The file behind it can't be made, opened or sized.
    #[error("can't {action} the file behind guest RAM")]
    File {
        /// What failed.
        action: &'static str,
        /// How.
        source: io::Error,
    },
    /// It can't be mapped.
    #[error("can't map {size:#x} bytes of guest RAM")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// How it failed.
        source: MmapRegionError,
    },
    /// An option that the host does not have or does not allow.
    #[error("the host refuses {option} for guest RAM")]
    Option {
        /// Which.
        option: &'static str,
        /// How.
        source: io::Error,
    },
    /// Regions of a guest overlap or wrap.
    #[error("guest RAM at {gpa} wraps or overlaps other RAM")]
    Layout {
        /// Where.
        gpa: Gpa,
    },
}

/// One block of guest RAM, mapped until the last owner of the mapping is gone.
#[derive(Clone, Debug)]
pub struct GuestRam {
    region: Arc<MmapRegion>,
    page: u64,
}

impl GuestRam {
    /// Allocates and maps.
    pub fn new(config: &RamConfig) -> Result<Self, RamError> {
        Self::with_progress(config, |_| {})
    }

    /// The same, and tells how prefaulting goes on (at least once per 64 MiB).
    pub fn with_progress(
        config: &RamConfig,
        progress: impl FnMut(Prefault),
    ) -> Result<Self, RamError> {
        access::install();
        let page = config.backing.page_bytes();
        let size = config.size;
        let bytes = usize::try_from(size)
            .ok()
            .filter(|_| size != 0 && size.is_multiple_of(page) && isize::try_from(size).is_ok());
        let bytes = bytes.ok_or(RamError::Size { size, page })?;
        let region = map(&config.backing, bytes)?;
        let ram = Self {
            region: Arc::new(region),
            page,
        };
        advice::apply(&ram, config, progress)?;
        Ok(ram)
    }

    /// The first byte in the monitor.
    pub fn hva(&self) -> Hva {
        Hva::new(self.region.as_ptr() as u64)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// Where it lies in the monitor.
    pub fn range(&self) -> HvaRange {
        HvaRange::new(self.hva(), self.size()).expect("a mapping does not wrap")
    }

    /// The size of the backing's pages (transparent huge pages do not count).
    pub fn page_bytes(&self) -> u64 {
        self.page
    }

    /// The file behind it, to share it with another process (vhost-user), with its offset.
    pub fn file(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.region
            .file_offset()
            .map(|f| (f.file().as_fd(), f.start()))
    }

    /// The mapping.
    pub fn mapping(&self) -> &Arc<MmapRegion> {
        &self.region
    }

    /// Gives pages back to the host: they read as zeroes afterwards (balloon, free page reporting).
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), RamError> {
        advice::discard(self, offset, len)
    }
}

/// The view of several blocks at their guest addresses that the rust-vmm crates use.
pub fn guest_memory(blocks: &[(Gpa, &GuestRam)]) -> Result<GuestMemoryMmap, RamError> {
    let mut view = GuestMemoryMmap::new();
    for (gpa, ram) in blocks {
        let layout = || RamError::Layout { gpa: *gpa };
        let region = GuestRegionMmap::with_arc(ram.region.clone(), GuestAddress(gpa.raw()));
        view = view
            .insert_region(Arc::new(region.ok_or_else(layout)?))
            .map_err(|_| layout())?;
    }
    Ok(view)
}

fn map(backing: &Backing, bytes: usize) -> Result<MmapRegion, RamError> {
    let file = backing.open(bytes as u64)?;
    let sharing = match (&file, backing) {
        (None, _) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        (
            Some(_),
            Backing::File {
                sharing: Sharing::Private,
                ..
            },
        ) => libc::MAP_PRIVATE,
        (Some(_), _) => libc::MAP_SHARED,
    };
    // Huge pages are reserved now; of everything else, the host promises nothing in advance.
    let reserve = if matches!(backing, Backing::HugeTlb(_)) {
        0
    } else {
        libc::MAP_NORESERVE
    };
    let offset = file.map(|f: File| FileOffset::new(f, 0));
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let mut region =
        MmapRegion::build(offset, bytes, prot, sharing | reserve).map_err(|source| {
            RamError::Map {
                size: bytes as u64,
                source,
            }
        })?;
    region.set_hugetlbfs(matches!(backing, Backing::HugeTlb(_)));
    Ok(region)
}
