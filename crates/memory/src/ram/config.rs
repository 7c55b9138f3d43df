//! What RAM is asked for.
#![expect(unsafe_code, reason = "memfd_create has no safe wrapper in libc")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::FromRawFd;
use std::path::PathBuf;

use super::RamError;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct RamConfig {
    /// Bytes: a multiple of the backing's page.
    pub size: u64,
    /// Where the memory comes from.
    pub backing: Backing,
    /// Transparent huge pages.
    pub thp: Thp,
    /// Whether every page is allocated now.
    pub prefault: bool,
    /// Whether the host may merge equal pages.
    pub ksm: Ksm,
    /// Which nodes of the host the pages come from.
    pub numa: Option<Numa>,
    /// Whether core dumps hold it.
    pub dump: Dump,
}

impl RamConfig {
    /// A memfd of this size, nothing prefaulted, kept out of core dumps.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memfd,
            thp: Thp::Advise,
            prefault: false,
            ksm: Ksm::No,
            numa: None,
            dump: Dump::Exclude,
        }
    }

    /// The same, but private anonymous memory: for a machine whose RAM no other process maps.
    ///
    /// Most hosts give huge pages to anonymous memory on advice and refuse them to memfds
    /// (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `never`), and with huge pages a load
    /// that misses the caches costs little more than half.
    pub fn private(size: u64) -> Self {
        Self {
            backing: Backing::Anonymous,
            ..Self::new(size)
        }
    }
}

/// Where RAM comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// An anonymous file that other processes can map.
    #[default]
    Memfd,
    /// A memfd of huge pages.
    HugeTlb(HugePage),
    /// A file; made where it does not exist, grown where it is too short, never cut.
    File {
        /// Its path.
        path: PathBuf,
        /// Whether the guest's writes reach it.
        sharing: Sharing,
    },
}

/// Whether the guest's writes reach the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Yes, and others see them.
    Shared,
    /// No: a page is copied when it is first written.
    Private,
}

/// A size of the host's huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

/// Transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thp {
    /// Ask for them; a host without them is no error.
    Advise,
    /// Refuse them.
    Never,
    /// Say nothing.
    Default,
}

/// Kernel same-page merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ksm {
    /// Equal private pages may be merged.
    Mergeable,
    /// No.
    No,
}

/// Whether core dumps of the monitor hold the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dump {
    /// They do.
    Include,
    /// They don't.
    Exclude,
}

/// Where the host takes pages from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numa {
    /// How strictly.
    pub policy: NumaPolicy,
    /// The host's nodes, below 64.
    pub nodes: Vec<u8>,
}

/// How strictly (`mbind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaPolicy {
    /// From these nodes only.
    Bind,
    /// From these in turn.
    Interleave,
    /// From the first of these, if it has pages left.
    Preferred,
}

impl HugePage {
    /// Bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => addr::PageSize::Size2M.bytes(),
            Self::Size1G => addr::PageSize::Size1G.bytes(),
        }
    }

    fn memfd_flag(self) -> u32 {
        libc::MFD_HUGETLB
            | match self {
                Self::Size2M => libc::MFD_HUGE_2MB,
                Self::Size1G => libc::MFD_HUGE_1GB,
            }
    }
}

impl Backing {
    pub(super) fn page_bytes(&self) -> u64 {
        match self {
            Self::HugeTlb(page) => page.bytes(),
            _ => addr::PageSize::Size4K.bytes(),
        }
    }

    /// The file behind the memory, as long as it must be.
    pub(super) fn open(&self, size: u64) -> Result<Option<File>, RamError> {
        let file = match self {
            Self::Anonymous => return Ok(None),
            Self::Memfd => memfd(0),
            Self::HugeTlb(page) => memfd(page.memfd_flag()),
            Self::File { path, .. } => OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path),
        };
        let file = file.map_err(|source| RamError::File {
            action: "open",
            source,
        })?;
        grow(&file, size).map_err(|source| RamError::File {
            action: "size",
            source,
        })?;
        Ok(Some(file))
    }
}

fn memfd(flags: u32) -> io::Result<File> {
    // SAFETY: the name is a C string; a descriptor that is not negative is ours alone.
    unsafe {
        let fd = libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC | flags);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(File::from_raw_fd(fd))
        }
    }
}

fn grow(file: &File, size: u64) -> io::Result<()> {
    if file.metadata()?.len() < size {
        file.set_len(size)
    } else {
        Ok(())
    }
}
