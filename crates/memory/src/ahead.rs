//! Fault-ahead: a guest that writes to one fresh page after another gets the pages in front of it in
//! one call to the host, instead of by one fault each.
//!
//! A page fault of the host costs a few times what providing a page costs. Like the host's own
//! read-ahead this bets that a run of consecutive pages goes on: with each `MADV_POPULATE_WRITE`
//! (madvise(2)) at most as many pages are provided as the run was long, and never more than
//! [`MOST`], so that a guest holds at most twice the pages that it wrote to. Nothing else tells the
//! difference:
//!
//! - only private anonymous memory, whose fresh pages nobody sees but their count;
//! - only if the page at hand is not there yet, so that memory in use is left alone;
//! - never after [`forbid`]: a process that watches its faults (userfaultfd) would see more of them,
//!   and one that forbade itself system calls may die of ours.

#![expect(unsafe_code, reason = "mincore and madvise on the program's memory")]

use std::sync::atomic::{AtomicBool, Ordering};

use addr::{Address, Hva, HvaRange};

use crate::pagemap::Pagemap;

/// Pages that one call provides at most: a writer may have to wait for a vCPU that is in it.
const MOST: u64 = 256;
/// A run shorter than this is chance.
const LEAST: u64 = 16;
const PAGE: u64 = 4096;

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// Ends fault-ahead in this process for good.
pub fn forbid() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// Where one vCPU's writes go.
#[derive(Debug, Default)]
pub struct Ahead {
    /// Number of the page behind the last one.
    next: u64,
    /// Consecutive pages so far.
    run: u64,
    /// Pages below this number are settled.
    until: u64,
    /// The last mapping looked up, and whether it is private anonymous memory.
    mapping: Option<(HvaRange, Kind)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Other,
}

impl Ahead {
    /// The guest is about to write to the page of `hva`; `left` bytes from the page's start on are
    /// the same slot's.
    #[inline]
    pub fn written(&mut self, hva: Hva, left: u64) {
        let page = hva.raw() / PAGE;
        if page != self.next {
            self.begin(page);
            return;
        }
        self.next = page + 1;
        self.run += 1;
        if self.run >= LEAST && page >= self.until {
            self.look(page, left / PAGE);
        }
    }

    fn begin(&mut self, page: u64) {
        // The same page again breaks no run.
        if page + 1 != self.next {
            *self = Self {
                next: page + 1,
                mapping: self.mapping,
                ..Self::default()
            };
        }
    }

    #[cold]
    fn look(&mut self, page: u64, left: u64) {
        if FORBIDDEN.load(Ordering::Relaxed) {
            self.until = u64::MAX;
            return;
        }
        let pages = self.run.min(MOST).min(left);
        let start = Hva::new(page * PAGE);
        self.until = page + MOST;
        if pages > 1 && !is_resident(start) && self.kind(start, pages * PAGE) == Kind::Anonymous {
            self.until = page + pages;
            populate(start, pages * PAGE);
        }
    }

    /// What a range lies in; the answer for the last mapping is kept, for it hardly ever changes,
    /// and then no harm is done.
    fn kind(&mut self, start: Hva, len: u64) -> Kind {
        let last = start.wrapping_add(len - 1);
        let holds = |range: HvaRange| range.contains(start) && range.contains(last);
        if let Some((range, kind)) = self.mapping
            && holds(range)
        {
            return kind;
        }
        let found = Pagemap::of_self().and_then(|maps| maps.mapping(start));
        let Some(mapping) = found.ok().flatten().filter(|m| holds(m.range)) else {
            return Kind::Other;
        };
        let plain = !mapping.is_file() && !mapping.permissions.shared && mapping.permissions.write;
        let kind = if plain { Kind::Anonymous } else { Kind::Other };
        self.mapping = Some((mapping.range, kind));
        kind
    }
}

/// Whether the host has a page there.
fn is_resident(page: Hva) -> bool {
    let mut there = 0u8;
    // SAFETY: reads no memory; writes one byte for one page.
    let answer = unsafe { libc::mincore(page.raw() as *mut _, PAGE as usize, &raw mut there) };
    answer != 0 || there & 1 != 0
}

fn populate(start: Hva, len: u64) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{GuestRam, RamConfig, Thp};

    /// Memory of small pages that nobody has touched.
    fn fresh(size: u64) -> GuestRam {
        let mut config = RamConfig::private(size);
        config.thp = Thp::Never;
        GuestRam::new(&config).unwrap()
    }

    fn resident(ram: &GuestRam) -> u64 {
        let start = ram.range().start();
        let pages = 0..ram.size() / PAGE;
        pages
            .filter(|page| is_resident(start.wrapping_add(page * PAGE)))
            .count() as u64
    }

    fn write_pages(ram: &GuestRam, pages: impl Iterator<Item = u64>) -> u64 {
        let mut ahead = Ahead::default();
        let mut count = 0;
        for page in pages {
            let hva = ram.range().start().wrapping_add(page * PAGE);
            ahead.written(hva, ram.size() - page * PAGE);
            crate::access::store(hva, 1, 8).unwrap();
            count += 1;
        }
        count
    }

    /// Nobody may end fault-ahead while others try it.
    static ORDER: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn a_run_gets_pages_in_front_and_at_most_as_many_again() {
        let _order = ORDER.lock().unwrap();
        let ram = fresh(64 << 20);
        let written = write_pages(&ram, 0..100);
        let there = resident(&ram);
        assert!(there > written, "{there} pages there, {written} written");
        assert!(
            there <= 2 * written,
            "{there} pages there, {written} written"
        );
    }

    #[test]
    fn scattered_writes_get_nothing_more() {
        let _order = ORDER.lock().unwrap();
        let ram = fresh(64 << 20);
        let written = write_pages(&ram, (0..400).map(|i| i * 3));
        assert_eq!(resident(&ram), written);
    }

    #[test]
    fn nothing_beyond_the_slot() {
        let _order = ORDER.lock().unwrap();
        let ram = fresh(4 << 20);
        let mut ahead = Ahead::default();
        for page in 0..64 {
            let hva = ram.range().start().wrapping_add(page * PAGE);
            ahead.written(hva, (64 - page) * PAGE);
            crate::access::store(hva, 1, 8).unwrap();
        }
        assert_eq!(resident(&ram), 64);
    }
}
