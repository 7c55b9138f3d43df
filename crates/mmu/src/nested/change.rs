//! Taking away and changing what the second level maps.
//!
//! Callers hold the MMU's change lock, so that there is one writer of this kind at a time; faults
//! go on meanwhile. Tables that were unlinked are collected in `unlinked`; their entries are frozen,
//! so that a fault that is on its way through one starts again at the root. They go back to the
//! pool after all readers have passed a checkpoint.

use std::sync::atomic::{AtomicU64, Ordering};

use addr::Gfn;

use super::entry::{ENTRIES, Entry, Level, ROOT_LEVEL, State, Writes, frame_shift};
use super::pool::TableRef;
use super::table::{SecondLevel, Spare, child, exchange};

/// A range of guest frames: first, and first behind.
pub(crate) type Frames = std::ops::Range<u64>;

/// What to do with each entry that overlaps a range.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Unmap.
    Zap,
    /// Split large pages down to 4 KiB; let writes fault.
    Protect,
    /// Split large pages down to 4 KiB.
    Split,
}

impl SecondLevel {
    /// Unmaps all pages that overlap `frames`. A large page goes as a whole.
    pub(crate) fn zap(&self, frames: Frames, unlinked: &mut Vec<TableRef>) {
        self.change(&frames, Change::Zap, unlinked);
    }

    /// Lets writes to `frames` fault again, frame by frame: for a dirty log.
    pub(crate) fn protect(&self, frames: Frames, spare: &mut Spare) {
        self.change(&frames, Change::Protect, spare);
    }

    /// Lets writes to some of 64 frames fault again: bit `n` of `mask` is frame `first + n`. A large
    /// page that maps one is split: there are such where a log began with all pages marked.
    pub(crate) fn protect_word(&self, first: Gfn, mut mask: u64, spare: &mut Spare) {
        let mut table: Option<(u64, TableRef)> = None;
        while mask != 0 {
            let gfn = Gfn::new(first.number() + u64::from(mask.trailing_zeros()));
            mask &= mask - 1;
            let block = gfn.number() >> frame_shift(2);
            if table.is_none_or(|(known, _)| known != block) {
                if self.lookup(gfn).is_some_and(|mapped| mapped.level > 1) {
                    self.split(gfn.number()..gfn.number() + 1, spare);
                }
                table = self
                    .cell_at(2, gfn)
                    .and_then(|cell| child(Entry(cell.load(Ordering::Acquire))))
                    .map(|found| (block, found));
            }
            if let Some((_, table)) = table {
                protect_page(table.cell(super::table::index(gfn, 1)));
            }
        }
    }

    /// Splits large pages that overlap `frames`.
    fn split(&self, frames: Frames, spare: &mut Spare) {
        self.change(&frames, Change::Split, spare);
    }

    /// Unmaps what is mapped by tables where `frames` would have a large page, so that the next
    /// fault installs one.
    pub(crate) fn collapse(&self, frames: &Frames, unlinked: &mut Vec<TableRef>) {
        for level in [3, 2] {
            let pages = 1 << frame_shift(level);
            let first = frames.start.next_multiple_of(pages);
            let last = frames.end / pages * pages;
            if first < last {
                self.zap_tables(level, first..last, unlinked);
            }
        }
    }

    /// Takes away the tables (not the pages) that stand in entries of this level. `frames` is
    /// aligned to the level.
    fn zap_tables(&self, level: Level, frames: Frames, unlinked: &mut Vec<TableRef>) {
        for first in frames.step_by(1 << frame_shift(level)) {
            let Some(cell) = self.cell_at(level, Gfn::new(first)) else {
                continue;
            };
            if Entry(cell.load(Ordering::Acquire)).as_table().is_some() {
                self.zap_entry(cell, level, unlinked);
            }
        }
    }

    /// The entry of this level that covers the frame, where the tables above it exist.
    fn cell_at(&self, level: Level, gfn: Gfn) -> Option<&AtomicU64> {
        let mut cell = self.root.get(super::table::index_in_root(gfn))?;
        for below in (level..ROOT_LEVEL).rev() {
            let table = child(Entry(cell.load(Ordering::Acquire)))?;
            cell = table.cell(super::table::index(gfn, below));
        }
        Some(cell)
    }

    /// `tables` takes unlinked tables (zap) or provides new ones (the others).
    fn change(&self, frames: &Frames, change: Change, tables: &mut Vec<TableRef>) {
        let pages = 1 << frame_shift(ROOT_LEVEL);
        let end = frames.end.min(self.root.len() as u64 * pages);
        let mut first = frames.start / pages * pages;
        while first < end {
            let cell = &self.root[(first / pages) as usize];
            self.change_entry(cell, ROOT_LEVEL, first, frames, change, tables);
            first += pages;
        }
    }

    fn change_entry(
        &self,
        cell: &AtomicU64,
        level: Level,
        first: u64,
        frames: &Frames,
        change: Change,
        tables: &mut Vec<TableRef>,
    ) {
        loop {
            let entry = Entry(cell.load(Ordering::Acquire));
            let done = match entry.state() {
                State::Table(_) => {
                    self.change_table(cell, entry, level, first, frames, change, tables);
                    Some(())
                }
                State::Page(..) if change == Change::Zap => {
                    self.zap_entry(cell, level, tables);
                    Some(())
                }
                State::Page(..) if level > 1 => {
                    // On success the loop meets the new table and goes down.
                    self.split_entry(cell, entry, level, tables);
                    None
                }
                State::Page(_, Writes::Allowed) if change == Change::Protect => {
                    exchange(cell, entry, entry.with_writes(Writes::Fault))
                }
                State::Empty | State::Frozen | State::Page(..) => Some(()),
            };
            if done.is_some() {
                return;
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the state of one recursion, split in two functions"
    )]
    fn change_table(
        &self,
        cell: &AtomicU64,
        entry: Entry,
        level: Level,
        first: u64,
        frames: &Frames,
        change: Change,
        tables: &mut Vec<TableRef>,
    ) {
        let covered = frames.start <= first && first + (1 << frame_shift(level)) <= frames.end;
        if covered && change == Change::Zap {
            self.zap_entry(cell, level, tables);
            return;
        }
        let Some(table) = child(entry) else {
            return;
        };
        let pages = 1_u64 << frame_shift(level - 1);
        let from = frames.start.saturating_sub(first) / pages;
        let to = (frames.end - first).div_ceil(pages).min(ENTRIES as u64);
        for index in from..to {
            let below = table.cell(index as usize);
            self.change_entry(
                below,
                level - 1,
                first + index * pages,
                frames,
                change,
                tables,
            );
        }
    }

    /// Empties an entry and freezes what hung below it.
    fn zap_entry(&self, cell: &AtomicU64, level: Level, unlinked: &mut Vec<TableRef>) {
        let old = Entry(cell.swap(Entry::EMPTY.0, Ordering::SeqCst));
        self.unlink(old, level, unlinked);
    }

    fn unlink(&self, old: Entry, level: Level, unlinked: &mut Vec<TableRef>) {
        if old.is_page() {
            self.counts.add(level, -1);
        }
        let Some(table) = child(old) else {
            return;
        };
        for index in 0..ENTRIES {
            let below = table.cell(index).swap(Entry::FROZEN.0, Ordering::SeqCst);
            self.unlink(Entry(below), level - 1, unlinked);
        }
        unlinked.push(table);
    }

    /// Replaces a large page by a table of its parts, which map the same. Fails (and changes
    /// nothing) where the entry changed meanwhile.
    fn split_entry(&self, cell: &AtomicU64, entry: Entry, level: Level, spare: &mut Spare) {
        let table = self.spare_table(spare);
        for index in 0..ENTRIES {
            let part = entry.fragment(level, index);
            table.cell(index).store(part.0, Ordering::Relaxed);
        }
        if exchange(cell, entry, Entry::table(table.address())).is_some() {
            self.counts.add(level, -1);
            self.counts.add(level - 1, ENTRIES as i64);
            return;
        }
        for index in 0..ENTRIES {
            table.cell(index).store(Entry::EMPTY.0, Ordering::Relaxed);
        }
        spare.push(table);
    }

    /// Makes unlinked tables usable again. All readers have passed a checkpoint since.
    pub(crate) fn recycle(&self, unlinked: Vec<TableRef>) {
        self.pool.give_back(unlinked);
    }
}

/// Lets writes through a 4 KiB entry fault.
fn protect_page(cell: &AtomicU64) {
    loop {
        let entry = Entry(cell.load(Ordering::Acquire));
        if !entry.is_page() || entry.writes() == Writes::Fault {
            return;
        }
        if exchange(cell, entry, entry.with_writes(Writes::Fault)).is_some() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Install;
    use super::*;
    use addr::Hfn;

    fn mapped_gigabyte() -> (SecondLevel, Spare) {
        let table = SecondLevel::new(40);
        let mut spare = Spare::new();
        let what = Install {
            frame: Hfn::new(0x10_0000),
            level: 3,
            writes: Writes::Allowed,
        };
        table.install(Gfn::new(0), what, &mut spare);
        (table, spare)
    }

    #[test]
    fn protect_splits_only_what_it_must() {
        let (table, mut spare) = mapped_gigabyte();
        table.protect(3..5, &mut spare);
        let at = |n| table.lookup(Gfn::new(n)).unwrap();
        assert_eq!((at(3).level, at(3).writes), (1, Writes::Fault));
        assert_eq!((at(5).level, at(5).writes), (1, Writes::Allowed));
        assert_eq!((at(512).level, at(512).writes), (2, Writes::Allowed));
        assert_eq!(at(0x3_ffff).frame, Hfn::new(0x13_ffff));
        assert_eq!(table.counts.get(), [512, 511, 0]);
        table.check_invariants().unwrap();
    }

    #[test]
    fn zap_unlinks_tables_and_freezes_them() {
        let (table, mut spare) = mapped_gigabyte();
        table.split(0..1, &mut spare);
        let mut unlinked = Vec::new();
        table.zap(0..1024, &mut unlinked);
        assert_eq!(unlinked.len(), 1, "the table of the first 2 MiB");
        assert_eq!(unlinked[0].cell(7).load(Ordering::Relaxed), Entry::FROZEN.0);
        assert_eq!(table.lookup(Gfn::new(1023)), None);
        assert!(table.lookup(Gfn::new(1024)).is_some());
        assert_eq!(table.counts.get(), [0, 510, 0]);
        table.recycle(unlinked);
        table.check_invariants().unwrap();
    }

    #[test]
    fn collapse_makes_room_for_large_pages() {
        let (table, mut spare) = mapped_gigabyte();
        table.split(0..1, &mut spare);
        let mut unlinked = Vec::new();
        table.collapse(&(0..512), &mut unlinked);
        assert_eq!(unlinked.len(), 1);
        assert_eq!(table.lookup(Gfn::new(0)), None);
        assert!(table.lookup(Gfn::new(512)).is_some());
        table.recycle(unlinked);
        let mut unlinked = Vec::new();
        table.collapse(&(0..0x4_0000), &mut unlinked);
        assert_eq!(table.lookup(Gfn::new(512)), None);
        table.recycle(unlinked);
        table.check_invariants().unwrap();
    }
}
