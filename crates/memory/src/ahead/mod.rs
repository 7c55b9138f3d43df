//! Fault-ahead: a guest that writes to one fresh page after another gets the pages in front of it in
//! one call to the host, instead of by one fault each.
//!
//! A page fault of the host costs a few times what providing a page costs. Like the host's own
//! read-ahead this bets that a run of consecutive pages goes on. At most as many pages are provided as
//! the run was long, and never more than [`MOST`] (two huge pages), so that a guest
//! holds at most twice the pages that it wrote to. A long run shares the work with a thread of
//! its own ([`Helper`]). Nothing else tells the difference:
//!
//! - only private anonymous memory, whose fresh pages nobody sees but their count;
//! - only if the page at hand is not there yet, so that memory in use is left alone;
//! - only inside the memslot;
//! - the host's limits hold: pages come from the same accounts as those of faults, and where there are
//!   none left, the call fails and the guest's own write finds out;
//! - never after [`forbid`]: a process that watches its faults (userfaultfd) would see more of them,
//!   and one that forbade itself system calls may die of ours.

mod helper;
mod host;

use std::sync::atomic::{AtomicBool, Ordering};

use addr::{Hva, HvaRange};

pub use helper::Helper;
use host::{Kind, PAGE};

use crate::quiesce::Domain;

/// Pages that are provided at once at most: 4 MiB.
const MOST: u64 = 1024;
/// Pages between two looks at whether somebody waits.
const STEP: u64 = 128;
/// Pages in use until the next look at whether they are.
const SETTLED: u64 = 256;
/// A run shorter than this is chance.
const LEAST: u64 = 16;
/// Fewer pages are not worth waking a thread.
const SHARED: u64 = 128;

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
    /// The last mapping looked up.
    mapping: Option<(HvaRange, Kind)>,
}

/// Whether a write is one to look in front of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Look {
    /// Call [`Ahead::look`].
    Due,
    /// Not here.
    No,
}

impl Ahead {
    /// The guest is about to write to the page of `hva`.
    #[inline]
    pub fn written(&mut self, hva: Hva) -> Look {
        let page = hva.raw() / PAGE;
        if page != self.next {
            self.begin(page);
            return Look::No;
        }
        self.next = page + 1;
        self.run += 1;
        if self.run >= LEAST && page >= self.until {
            Look::Due
        } else {
            Look::No
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

    /// Provides pages from that of `hva` on, inside the `left` bytes from there that are the same
    /// slot's. The caller is in guest mode, and stops when it is `wanted` elsewhere.
    #[cold]
    pub fn look(
        &mut self,
        hva: Hva,
        left: u64,
        helper: &Helper,
        domain: &Domain,
        wanted: impl Fn() -> bool,
    ) {
        if FORBIDDEN.load(Ordering::Relaxed) {
            self.until = u64::MAX;
            return;
        }
        let page = hva.raw() / PAGE;
        let start = Hva::new(page * PAGE);
        // Asked again after a while: memory in use is not asked for at each page.
        self.until = page + SETTLED;
        if host::is_resident(start) {
            return;
        }
        let pages = self.run.min(MOST).min(left / PAGE);
        let pages = self.private_pages(start, pages);
        if pages < 2 {
            return;
        }
        self.until = page + pages;
        // The thread gets the larger part: the guest also has to use the pages.
        let own = if pages < SHARED {
            pages
        } else {
            pages * 15 / 32
        };
        let rest = pages - own;
        if rest > 0 && helper.order(domain, page + own, rest).is_none() {
            self.until = page + own;
        }
        provide(page, own, wanted);
    }

    /// How many of the pages lie in one private mapping. The answer for the last mapping is kept, for
    /// it hardly ever changes, and then no harm is done.
    fn private_pages(&mut self, start: Hva, pages: u64) -> u64 {
        if self.mapping.is_none_or(|(range, _)| !range.contains(start)) {
            self.mapping = host::mapping(start);
        }
        match self.mapping {
            Some((range, Kind::Private)) if range.contains(start) => {
                pages.min((range.end().raw() - start.raw()) / PAGE)
            }
            _ => 0,
        }
    }
}

/// Provides pages from number `first` on, unless somebody waits for the caller.
fn provide(first: u64, pages: u64, wanted: impl Fn() -> bool) {
    for done in (0..pages).step_by(STEP as usize) {
        if wanted() {
            return;
        }
        let start = Hva::new((first + done) * PAGE);
        host::populate(start, (pages - done).min(STEP) * PAGE);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use addr::Address;

    use super::*;
    use crate::quiesce::Requests;
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
            .filter(|page| host::is_resident(start.wrapping_add(page * PAGE)))
            .count() as u64
    }

    fn write_pages(ram: &GuestRam, pages: impl Iterator<Item = u64>) -> u64 {
        let mut writer = Writer::default();
        let mut count = 0;
        for page in pages {
            let hva = ram.range().start().wrapping_add(page * PAGE);
            writer.written(hva, ram.size() - page * PAGE);
            crate::access::store(hva, 1, 8).unwrap();
            count += 1;
        }
        count
    }

    /// A vCPU that writes, with all that it needs.
    #[derive(Default)]
    struct Writer {
        ahead: Ahead,
        helper: Helper,
        domain: Arc<Domain>,
    }

    impl Writer {
        fn written(&mut self, hva: Hva, left: u64) {
            if self.ahead.written(hva) == Look::Due {
                self.ahead
                    .look(hva, left, &self.helper, &self.domain, || false);
            }
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            // Counts afterwards are to find no order under way.
            let _ = self.domain.request_and_wait(Requests::FLUSH_TLB, None);
        }
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
        let mut writer = Writer::default();
        for page in 0..64 {
            let hva = ram.range().start().wrapping_add(page * PAGE);
            writer.written(hva, (64 - page) * PAGE);
            crate::access::store(hva, 1, 8).unwrap();
        }
        assert_eq!(resident(&ram), 64);
    }
}
