//! Fault-ahead: a guest that writes to one fresh page after another gets the pages in front of it in
//! one call to the host, instead of by one fault each.
//!
//! A page fault of the host costs a few times what providing a page costs. Like the host's own
//! read-ahead this bets that a run of consecutive pages goes on. At most as many pages are provided as
//! the run was long, and never more than [`MOST`] (two huge pages), so that a guest
//! holds at most twice the pages that it wrote to. Nothing else tells the difference:
//!
//! - only private anonymous memory, whose fresh pages nobody sees but their count;
//! - only if the page at hand is not there yet, so that memory in use is left alone;
//! - only inside the memslot;
//! - the host's limits hold: pages come from the same accounts as those of faults, and where there are
//!   none left, the call fails and the guest's own write finds out;
//! - never after [`forbid`]: a process that watches its faults (userfaultfd) would see more of them,
//!   and one that forbade itself system calls may die of ours.
//!
//! A long run shares the work with a thread of its own ([`Helper`]), window after window. The vCPU
//! provides the front of a window while the thread provides the rest; and when the guest gets to that
//! rest, the thread is given its part of the next window, so that it works while the guest uses pages:
//!
//! ```text
//!             │◄────────── window ─────────►│◄────────── next window ──────►│
//!    guest ──►│  vCPU's part │ thread's part│  vCPU's part │ thread's part  │
//!                            ▲              ▲
//!             thread's part of the next     the vCPU provides its part of it
//!             window is ordered here        here
//! ```
//!
//! Whoever was late gets less of the next window.

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
/// Pages until the next look at whether a thread that is late has become free.
const LATE: u64 = 32;
/// The vCPU's part of a window, in 64ths: in the beginning, at least, and at most. It also has to run
/// the guest.
const PART: u64 = 28;
const PARTS: std::ops::RangeInclusive<u64> = 16..=40;

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// Ends fault-ahead in this process for good.
pub fn forbid() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// Where one vCPU's writes go.
#[derive(Debug)]
pub struct Ahead {
    /// Number of the page behind the last one.
    next: u64,
    /// Consecutive pages so far.
    run: u64,
    /// Pages below this number are settled.
    until: u64,
    /// Pages below this number are provided, or the thread's to provide.
    end: u64,
    /// Where the thread's part of the present window begins.
    rest: u64,
    /// The window behind `end`: where the thread's part of it begins and ends.
    planned: Option<(u64, u64)>,
    /// The vCPU's part of a window, in 64ths.
    part: u64,
    /// The last mapping looked up.
    mapping: Option<(HvaRange, Kind)>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self {
            next: 0,
            run: 0,
            until: 0,
            end: 0,
            rest: 0,
            planned: None,
            part: PART,
            mapping: None,
        }
    }
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
                part: self.part,
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
        let most = self.run.min(MOST).min(left / PAGE);
        if page < self.end {
            let most = self.private_pages(start, most);
            self.plan(page, most, helper, domain);
            return;
        }
        let planned = self.planned.take().filter(|_| page == self.end);
        // Asked again after a while: memory in use is not asked for at each page.
        self.until = page + SETTLED;
        if host::is_resident(start) {
            return;
        }
        let most = self.private_pages(start, most);
        if most < 2 {
            return;
        }
        let own = match planned {
            Some((rest, end)) => {
                (self.until, self.end) = (rest, end);
                most.min(rest - page)
            }
            None => self.share(page, most, helper, domain),
        };
        self.rest = self.until;
        provide(page, own, wanted);
    }

    /// Gives the thread its part of a new window. How many pages are the vCPU's.
    fn share(&mut self, page: u64, pages: u64, helper: &Helper, domain: &Domain) -> u64 {
        let own = pages * self.part / 64;
        if pages < SHARED || helper.order(domain, page + own, pages - own).is_none() {
            // Alone: the whole of a small window, half of a large one.
            let own = if pages < SHARED { pages } else { pages / 2 };
            (self.until, self.end) = (page + own, page + own);
            return own;
        }
        (self.until, self.end) = (page + own, page + pages);
        own
    }

    /// The guest is in the thread's part of a window: gives the thread its part of the next, if it is
    /// done with this one. `most` pages from `page` on may be there.
    fn plan(&mut self, page: u64, most: u64, helper: &Helper, domain: &Domain) {
        let there = self.end - page;
        let pages = most.saturating_sub(there);
        if self.planned.is_some() || pages < SHARED {
            self.until = self.end;
            return;
        }
        let own = pages * self.part / 64;
        let (begin, end) = (self.end + own, self.end + pages);
        if helper.order(domain, begin, end - begin).is_some() {
            self.planned = Some((begin, end));
            self.until = self.end;
            if page == self.rest {
                self.part = (self.part - 1).max(*PARTS.start());
            }
        } else {
            self.until = self.end.min(page + LATE);
            if page == self.rest {
                self.part = (self.part + 1).min(*PARTS.end());
            }
        }
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
    pub(super) fn fresh(size: u64) -> GuestRam {
        let mut config = RamConfig::private(size);
        config.thp = Thp::Never;
        GuestRam::new(&config).unwrap()
    }

    pub(super) fn resident(ram: &GuestRam) -> u64 {
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
    fn long_runs_have_at_most_twice_their_pages() {
        let _order = ORDER.lock().unwrap();
        for pages in [200, 1_000, 3_000, 7_000] {
            let ram = fresh(64 << 20);
            let written = write_pages(&ram, 0..pages);
            let there = resident(&ram);
            assert!(
                there <= 2 * written && there <= written + MOST,
                "{there} pages there, {written} written"
            );
        }
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
