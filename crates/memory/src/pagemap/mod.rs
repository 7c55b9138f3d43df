//! From a host virtual address to the page frame: the host's page tables, read from outside.
//!
//! It is the last of the four steps, and no monitor takes part in it: the host's MMU walks the page
//! tables of the process as for any program. The kernel shows them in `/proc/PID/pagemap`, and what
//! it knows of a frame in `/proc/kpageflags` and `/proc/kpagecount` (the kernel's
//! `Documentation/admin-guide/mm/pagemap.rst`).
//!
//! | who asks                     | present, swapped, shared | frame number | flags and counts |
//! |------------------------------|--------------------------|--------------|------------------|
//! | `CAP_SYS_ADMIN`              | yes                      | yes          | yes (as root)    |
//! | the process's own user       | yes                      | reads as 0   | no               |
//! | others                       | no                       | no           | no               |
//!
//! The answer holds at the moment of the question: the host may swap, move or merge a page at any
//! time.

mod entry;
mod flags;
mod huge;
mod maps;
mod scan;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use addr::{Frame, Hfn, Hva, HvaRange, Pfn};

pub use entry::{FrameNumber, PageEntry, PageState};
pub use flags::PageFlags;
pub use huge::{forbid_scans, huge_page_at, huge_ranges};
pub use maps::{Device, Mapping, Permissions};

/// Why a process can't be looked into.
#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    /// The file can't be opened: no such process, or not allowed.
    #[error("can't open {path}")]
    Open {
        /// Which file.
        path: String,
        /// How it failed.
        source: io::Error,
    },
    /// It can't be read.
    #[error("can't read what lies at {hva}")]
    Read {
        /// The address asked for.
        hva: Hva,
        /// How it failed.
        source: io::Error,
    },
    /// The list of mappings can't be understood.
    #[error("can't understand the mapping {line:?}")]
    Mapping {
        /// The line.
        line: String,
    },
}

/// What the host knows about one page of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// The page asked for.
    pub page: Hfn,
    /// What its page-table entry says.
    pub entry: PageEntry,
    /// What the kernel says about the frame, where it tells.
    pub flags: Option<PageFlags>,
    /// How often the frame is mapped, where the kernel tells.
    pub map_count: Option<u64>,
}

impl HostPage {
    /// Whether the frame belongs to a huge page; `None` where the kernel does not tell.
    pub fn is_huge(&self) -> Option<bool> {
        self.flags
            .map(|f| f.intersects(PageFlags::HUGE | PageFlags::THP))
    }
}

/// Looks into one process.
#[derive(Debug)]
pub struct Pagemap {
    process: String,
    entries: File,
    flags: Option<File>,
    counts: Option<File>,
}

const ENTRY: u64 = 8;

impl Pagemap {
    /// This process.
    pub fn of_self() -> Result<Self, PagemapError> {
        Self::open("self".into())
    }

    /// Another process.
    pub fn of_process(pid: u32) -> Result<Self, PagemapError> {
        Self::open(pid.to_string())
    }

    fn open(process: String) -> Result<Self, PagemapError> {
        let path = format!("/proc/{process}/pagemap");
        let entries = File::open(&path).map_err(|source| PagemapError::Open { path, source })?;
        Ok(Self {
            process,
            entries,
            // For root alone; without them the answer has less in it.
            flags: File::open("/proc/kpageflags").ok(),
            counts: File::open("/proc/kpagecount").ok(),
        })
    }

    /// What lies behind one address.
    pub fn look_up(&self, hva: Hva) -> Result<HostPage, PagemapError> {
        let page = hva.frame();
        let mut entry = [0; ENTRY as usize];
        self.read_entries(page, &mut entry)
            .map_err(|source| PagemapError::Read { hva, source })?;
        Ok(self.host_page(page, u64::from_le_bytes(entry)))
    }

    /// Whether an address is mapped by a huge page; `None` where the kernel does not tell.
    pub fn is_huge(&self, hva: Hva) -> Option<bool> {
        let range = HvaRange::new(hva.frame().start(), 0x1000)?;
        let huge = self.huge_ranges(range)?;
        Some(!huge.is_empty())
    }

    /// What lies behind each page that `range` touches, in order.
    pub fn look_up_range(&self, range: HvaRange) -> Result<Vec<HostPage>, PagemapError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let first = range.start().frame();
        let last = Hva::new(range.end().raw() - 1).frame();
        let count = last.number() - first.number() + 1;
        let mut pages = Vec::new();
        for chunk in (0..count).step_by(CHUNK) {
            let page = Hfn::new(first.number() + chunk);
            let mut entries = vec![0; ((count - chunk).min(CHUNK as u64) * ENTRY) as usize];
            self.read_entries(page, &mut entries)
                .map_err(|source| PagemapError::Read {
                    hva: page.start(),
                    source,
                })?;
            let (entries, _) = entries.as_chunks::<8>();
            pages.extend((page.number()..).zip(entries).map(|(number, entry)| {
                self.host_page(Hfn::new(number), u64::from_le_bytes(*entry))
            }));
        }
        Ok(pages)
    }

    /// The mapping that holds an address: which file, or what else it is.
    pub fn mapping(&self, hva: Hva) -> Result<Option<Mapping>, PagemapError> {
        Ok(self.mappings()?.into_iter().find(|m| m.range.contains(hva)))
    }

    /// All mappings of the process, by address.
    pub fn mappings(&self) -> Result<Vec<Mapping>, PagemapError> {
        let path = format!("/proc/{}/maps", self.process);
        let text =
            std::fs::read_to_string(&path).map_err(|source| PagemapError::Open { path, source })?;
        maps::parse(&text)
    }

    /// The entries of pages from `page` on. Beyond the process's addresses there are none: they read
    /// as absent.
    fn read_entries(&self, page: Hfn, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        let mut done = 0;
        while done < into.len() {
            // Frame numbers have 52 bits, so the product has 55.
            let at = page.number() * ENTRY + done as u64;
            match self.entries.read_at(&mut into[done..], at)? {
                0 => break,
                n => done += n,
            }
        }
        Ok(())
    }

    fn host_page(&self, page: Hfn, raw: u64) -> HostPage {
        let entry = PageEntry::from_raw(raw);
        let frame = entry.frame();
        HostPage {
            page,
            entry,
            flags: read_word(self.flags.as_ref(), frame).map(PageFlags::from_bits_retain),
            map_count: read_word(self.counts.as_ref(), frame),
        }
    }
}

/// Entries read at once.
const CHUNK: usize = 4096;

fn read_word(file: Option<&File>, frame: Option<Pfn>) -> Option<u64> {
    let mut word = [0; ENTRY as usize];
    file?
        .read_exact_at(&mut word, frame?.number() * ENTRY)
        .ok()?;
    Some(u64::from_le_bytes(word))
}

impl Pagemap {
    /// The parts of a range that are mapped by huge pages; `None` where the kernel does not tell
    /// (before Linux 6.7).
    pub fn huge_ranges(&self, range: HvaRange) -> Option<Vec<HvaRange>> {
        scan::ranges(&self.entries, range, scan::Huge::Any).ok()
    }

    /// Whether the kernel says that a frame belongs to a huge page; not where it does not tell.
    pub fn is_huge_frame(&self, frame: Pfn) -> bool {
        let flags = read_word(self.flags.as_ref(), Some(frame)).map(PageFlags::from_bits_retain);
        flags.is_some_and(|flags| flags.intersects(PageFlags::HUGE | PageFlags::THP))
    }
}

/// What a search for a frame came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameSearch {
    /// The page that the frame serves.
    pub page: Option<Hfn>,
    /// Whether there were pages whose frames the host does not tell.
    pub hidden: bool,
}

impl Pagemap {
    /// The first page that `range` touches which is served by this frame.
    pub fn find_frame(&self, range: HvaRange, frame: Pfn) -> Result<FrameSearch, PagemapError> {
        let mut search = FrameSearch::default();
        self.scan(range, |page, entry| {
            if entry.frame() == Some(frame) {
                search.page.get_or_insert(page);
            }
            search.hidden |= entry.state == PageState::Present(FrameNumber::Hidden);
        })?;
        Ok(search)
    }

    /// Shows the entry of each page that `range` touches, in order.
    pub fn scan(
        &self,
        range: HvaRange,
        mut see: impl FnMut(Hfn, PageEntry),
    ) -> Result<(), PagemapError> {
        if range.is_empty() {
            return Ok(());
        }
        let first = range.start().frame().number();
        let last = Hva::new(range.end().raw() - 1).frame().number();
        let mut entries = vec![0; CHUNK * ENTRY as usize];
        for from in (first..=last).step_by(CHUNK) {
            let count = (last - from + 1).min(CHUNK as u64);
            let entries = &mut entries[..(count * ENTRY) as usize];
            let page = Hfn::new(from);
            self.read_entries(page, entries)
                .map_err(|source| PagemapError::Read {
                    hva: page.start(),
                    source,
                })?;
            let (words, _) = entries.as_chunks::<8>();
            for (number, word) in (from..).zip(words) {
                see(
                    Hfn::new(number),
                    PageEntry::from_raw(u64::from_le_bytes(*word)),
                );
            }
        }
        Ok(())
    }
}
