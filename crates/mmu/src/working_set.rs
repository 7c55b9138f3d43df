//! Which pages the guest uses: for ballooning, idle-page tracking, and for showing.
//!
//! While somebody tracks, each translation marks its page and is given out for 4 KiB only. Taking
//! the marks makes every vCPU drop its TLB, so that the next access asks again. That works the same
//! on every path, because it needs none of their tables. Pages that hold only the guest's page
//! tables are not marked: no access of the guest's leads there.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use addr::{Frame, Gfn, Gpa, PageSize};
use memory::dirty::{DirtyBitmap, DirtyWord, NoMemory};

use crate::access::Translation;
use crate::mmu::Mmu;

/// Marks of one range of guest frames.
pub(crate) struct Tracker {
    space: usize,
    first: Gfn,
    marks: DirtyBitmap,
}

impl Mmu {
    /// Begins to track accesses to these frames of an address space; ends what was tracked before.
    pub fn track_accesses(&self, space: usize, frames: Range<Gfn>) -> Result<(), NoMemory> {
        let pages = frames.end.number().saturating_sub(frames.start.number());
        let tracker = Tracker {
            space,
            first: frames.start,
            marks: DirtyBitmap::new(pages)?,
        };
        self.tracker.store(Some(Arc::new(tracker)));
        self.tracking.store(true, Ordering::SeqCst);
        self.flush_vcpus();
        Ok(())
    }

    /// Ends tracking.
    pub fn stop_tracking_accesses(&self) {
        self.tracking.store(false, Ordering::SeqCst);
        self.tracker.store(None);
    }

    /// The pages accessed since the last call, or since tracking began: frame `64 * index + n` of
    /// the range for bit `n` of a word. Every vCPU drops its TLB.
    pub fn take_accessed(&self) -> Vec<DirtyWord> {
        let Some(tracker) = self.tracker.load_full() else {
            return Vec::new();
        };
        let taken = tracker.marks.take();
        self.flush_vcpus();
        taken
    }

    /// Marks what a translation leads to.
    #[cold]
    pub(crate) fn mark_accessed(&self, space: usize, translation: &mut Translation) {
        let Some(tracker) = &*self.tracker.load() else {
            return;
        };
        // Other pages of a large one must ask for themselves.
        translation.size = PageSize::Size4K;
        if tracker.space == space {
            tracker.mark(translation.gpa);
        }
    }
}

impl Tracker {
    fn mark(&self, gpa: Gpa) {
        let gfn = Gfn::containing(gpa);
        if let Some(page) = gfn.number().checked_sub(self.first.number()) {
            self.marks.mark(page);
        }
    }
}
