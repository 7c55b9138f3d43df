//! Reading and filling the second level, without locks.
//!
//! A root entry covers 1 GiB, so the root is an array indexed by the address; below it are at most
//! two tables. The array is as large as the guest's physical address space asks, but the host gives
//! it memory only where it is touched.

use std::sync::atomic::{AtomicU64, Ordering};

use addr::{Frame, Gfn, Hfn, Hva};

use super::entry::{ENTRIES, Entry, Level, ROOT_LEVEL, State, Writes, frame_shift};
use super::pool::{Pool, TableRef};
use crate::stats::PageCounts;

/// The second level of one address space: guest frame to host frame.
pub(crate) struct SecondLevel {
    pub(super) root: Box<[AtomicU64]>,
    pub(super) pool: Pool,
    /// Pages mapped now, by level.
    pub(crate) counts: PageCounts,
}

/// A page that the second level maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// The host frame of the guest frame asked for.
    pub(crate) frame: Hfn,
    /// The level of the entry.
    pub(crate) level: Level,
    /// Whether writes may go on.
    pub(crate) writes: Writes,
}

/// What an install came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A new entry.
    New,
    /// Writes go through an entry that was there.
    Raised,
    /// Somebody else was faster.
    Found,
}

/// What `install` is to map: `level` says how large the page may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Install {
    /// The host frame of the guest frame that faulted.
    pub(crate) frame: Hfn,
    /// The largest level whose page around it the memslot covers.
    pub(crate) level: Level,
    pub(crate) writes: Writes,
}

/// One entry of the second level, for those who show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecondLevelEntry {
    /// 3 is the root (1 GiB an entry), 1 the lowest.
    pub level: u8,
    /// The entry as it stands in memory; 0 is empty.
    pub raw: u64,
    /// Where it leads, if it maps a page: the host address of the guest frame asked for.
    pub hva: Option<Hva>,
    /// Whether it maps a page that takes writes.
    pub writable: bool,
}

impl SecondLevelEntry {
    fn new(level: Level, entry: Entry, gfn: Gfn) -> Self {
        let page = entry.is_page().then(|| mapped(entry, level, gfn));
        Self {
            level,
            raw: entry.0,
            hva: page.map(|p| p.frame.start()),
            writable: page.is_some_and(|p| p.writes == Writes::Allowed),
        }
    }
}

/// Tables at hand for the next installs, so that faults rarely meet at the pool's lock.
pub(crate) type Spare = Vec<TableRef>;

/// How many tables a vCPU takes from the pool at a time.
const SPARE: usize = 8;

impl SecondLevel {
    /// An empty one for guest physical addresses of so many bits (31 to 52).
    pub(crate) fn new(physical_bits: u32) -> Self {
        let gigabytes = 1_usize << (physical_bits.clamp(31, 52) - 30);
        Self {
            root: zeroed_root(gigabytes),
            pool: Pool::default(),
            counts: PageCounts::default(),
        }
    }

    /// The host frame that serves reads of `gfn`.
    #[inline]
    pub(crate) fn frame_of(&self, gfn: Gfn) -> Option<Hfn> {
        let mut entry = self.root_entry(gfn)?;
        let mut level = ROOT_LEVEL;
        while !entry.is_page() {
            level -= 1;
            entry = Entry(
                child(entry)?
                    .cell(index(gfn, level))
                    .load(Ordering::Acquire),
            );
        }
        let offset = gfn.number() & ((1 << frame_shift(level)) - 1);
        Some(Hfn::new(entry.first_frame() + offset))
    }

    /// The page that maps `gfn`.
    #[inline]
    pub(crate) fn lookup(&self, gfn: Gfn) -> Option<Mapped> {
        let mut level = ROOT_LEVEL;
        let mut entry = self.root_entry(gfn)?;
        loop {
            if entry.is_page() {
                return Some(mapped(entry, level, gfn));
            }
            let table = child(entry)?;
            level -= 1;
            entry = Entry(table.cell(index(gfn, level)).load(Ordering::Acquire));
        }
    }

    /// The level of the highest entry on the way to `gfn` that is no table.
    pub(crate) fn first_missing(&self, gfn: Gfn) -> Level {
        let mut level = ROOT_LEVEL;
        let mut next = self.root_entry(gfn);
        while let Some(table) = next.and_then(child) {
            level -= 1;
            next =
                (level > 1).then(|| Entry(table.cell(index(gfn, level)).load(Ordering::Acquire)));
        }
        level
    }

    /// The entries on the way to `gfn`, from the root on.
    pub(crate) fn path_to(&self, gfn: Gfn) -> Vec<SecondLevelEntry> {
        let mut path = Vec::new();
        let mut level = ROOT_LEVEL;
        let mut next = self.root_entry(gfn);
        while let Some(entry) = next {
            path.push(SecondLevelEntry::new(level, entry, gfn));
            let Some(table) = child(entry) else {
                break;
            };
            level -= 1;
            next = Some(Entry(table.cell(index(gfn, level)).load(Ordering::Acquire)));
        }
        path
    }

    fn root_entry(&self, gfn: Gfn) -> Option<Entry> {
        let cell = self.root.get(index_in_root(gfn))?;
        Some(Entry(cell.load(Ordering::Acquire)))
    }

    /// Maps the page around `gfn`, unless somebody else was faster; returns what is mapped now.
    ///
    /// Where a table already stands in the place of a large page, a smaller page is installed below
    /// it. `None`: the frame lies beyond the root, nothing can be installed.
    pub(crate) fn install(
        &self,
        gfn: Gfn,
        what: Install,
        spare: &mut Spare,
    ) -> Option<(Mapped, Outcome)> {
        loop {
            let root = self.root.get(index_in_root(gfn))?;
            if let Some(done) = self.install_from(root, gfn, what, spare) {
                return Some(done);
            }
        }
    }

    /// One descent. `None`: it met an entry that changed under it, or a frozen one.
    fn install_from(
        &self,
        root: &AtomicU64,
        gfn: Gfn,
        what: Install,
        spare: &mut Spare,
    ) -> Option<(Mapped, Outcome)> {
        let mut cell = root;
        let mut level = ROOT_LEVEL;
        loop {
            let entry = Entry(cell.load(Ordering::Acquire));
            match entry.state() {
                State::Frozen => return None,
                State::Table(_) => {}
                State::Page(..) => return upgrade(cell, entry, level, gfn, what),
                State::Empty if level <= what.level => {
                    return self.install_page(cell, level, gfn, what);
                }
                State::Empty => self.install_table(cell, spare)?,
            }
            let table = child(Entry(cell.load(Ordering::Acquire)))?;
            level -= 1;
            cell = table.cell(index(gfn, level));
        }
    }

    fn install_page(
        &self,
        cell: &AtomicU64,
        level: Level,
        gfn: Gfn,
        what: Install,
    ) -> Option<(Mapped, Outcome)> {
        let offset = gfn.number() & ((1 << frame_shift(level)) - 1);
        let first = Hfn::new(what.frame.number().wrapping_sub(offset));
        let entry = Entry::page(first, what.writes);
        exchange(cell, Entry::EMPTY, entry)?;
        self.counts.add(level, 1);
        Some((mapped(entry, level, gfn), Outcome::New))
    }

    /// Puts an empty table into an empty entry. `None`: somebody else changed the entry.
    fn install_table(&self, cell: &AtomicU64, spare: &mut Spare) -> Option<()> {
        let table = self.spare_table(spare);
        let done = exchange(cell, Entry::EMPTY, Entry::table(table.address()));
        if done.is_none() {
            spare.push(table);
        }
        done
    }

    /// An empty table that nobody else sees.
    pub(super) fn spare_table(&self, spare: &mut Spare) -> TableRef {
        loop {
            if let Some(table) = spare.pop() {
                return table;
            }
            self.pool.take(SPARE, spare);
        }
    }

    /// Gives the tables back that a vCPU has in store.
    pub(crate) fn return_spare(&self, spare: &mut Spare) {
        self.pool.give_back(spare.drain(..));
    }

    /// Bytes of all tables in use, the touched part of the root not counted.
    pub(crate) fn bytes(&self) -> usize {
        self.pool.bytes_in_use()
    }
}

/// The table that an entry of a second level leads to.
#[expect(unsafe_code, reason = "entries hold addresses of tables")]
pub(super) fn child(entry: Entry) -> Option<TableRef> {
    let address = entry.as_table()?;
    // SAFETY: entries get table addresses from `TableRef`s of their own second level's pool alone
    // (`install_table`, `split_entry`), and the pool lives as long as the second level.
    Some(unsafe { TableRef::from_address(address) })
}

/// An array that the host fills with zero pages when it is touched.
fn zeroed_root(len: usize) -> Box<[AtomicU64]> {
    // `vec![0; n]` asks the allocator for zeroed memory, which for large sizes is untouched mmap.
    let zeros = vec![0_u64; len].into_boxed_slice();
    into_atomic(zeros)
}

#[expect(
    unsafe_code,
    reason = "the only way to zeroed atomics without touching them"
)]
fn into_atomic(zeros: Box<[u64]>) -> Box<[AtomicU64]> {
    // SAFETY: AtomicU64 has the size, alignment (on x86-64) and bit validity of u64.
    unsafe { Box::from_raw(Box::into_raw(zeros) as *mut [AtomicU64]) }
}

/// Lets writes through an entry that maps the page already, if the fault was about that.
fn upgrade(
    cell: &AtomicU64,
    entry: Entry,
    level: Level,
    gfn: Gfn,
    what: Install,
) -> Option<(Mapped, Outcome)> {
    if what.writes == Writes::Fault || entry.writes() == Writes::Allowed {
        return Some((mapped(entry, level, gfn), Outcome::Found));
    }
    let upgraded = entry.with_writes(Writes::Allowed);
    exchange(cell, entry, upgraded)?;
    Some((mapped(upgraded, level, gfn), Outcome::Raised))
}

pub(super) fn exchange(cell: &AtomicU64, from: Entry, to: Entry) -> Option<()> {
    cell.compare_exchange(from.0, to.0, Ordering::SeqCst, Ordering::Acquire)
        .ok()
        .map(drop)
}

fn mapped(entry: Entry, level: Level, gfn: Gfn) -> Mapped {
    let State::Page(first, writes) = entry.state() else {
        unreachable!("callers pass page entries");
    };
    let offset = gfn.number() & ((1 << frame_shift(level)) - 1);
    Mapped {
        frame: Hfn::new(first.number() + offset),
        level,
        writes,
    }
}

/// Which root entry covers the frame.
pub(super) fn index_in_root(gfn: Gfn) -> usize {
    usize::try_from(gfn.number() >> frame_shift(ROOT_LEVEL)).unwrap_or(usize::MAX)
}

/// Which entry of a table at `level` covers the frame.
pub(super) fn index(gfn: Gfn, level: Level) -> usize {
    (gfn.number() >> frame_shift(level)) as usize % ENTRIES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(frame: u64, level: Level, writes: Writes) -> Install {
        Install {
            frame: Hfn::new(frame),
            level,
            writes,
        }
    }

    #[test]
    fn maps_large_pages_around_the_fault() {
        let table = SecondLevel::new(40);
        let mut spare = Spare::new();
        let gfn = Gfn::new(0x40_0234);
        let got = table.install(gfn, install(0x7f34, 2, Writes::Fault), &mut spare);
        let (mapped, outcome) = got.unwrap();
        assert_eq!((mapped.level, outcome), (2, Outcome::New));
        let neighbour = table.lookup(Gfn::new(0x40_0200)).unwrap();
        assert_eq!(neighbour.frame, Hfn::new(0x7f00));
        assert_eq!(table.lookup(Gfn::new(0x40_0400)), None);
        table.return_spare(&mut spare);
        assert_eq!(table.bytes(), 4096);
        table.check_invariants().unwrap();
    }

    #[test]
    fn a_write_fault_upgrades() {
        let table = SecondLevel::new(40);
        let mut spare = Spare::new();
        let gfn = Gfn::new(5);
        table.install(gfn, install(9, 1, Writes::Fault), &mut spare);
        assert_eq!(table.lookup(gfn).unwrap().writes, Writes::Fault);
        table.install(gfn, install(9, 1, Writes::Allowed), &mut spare);
        assert_eq!(table.lookup(gfn).unwrap().writes, Writes::Allowed);
    }

    #[test]
    fn beyond_the_root_nothing_is_mapped() {
        let table = SecondLevel::new(31);
        let mut spare = Spare::new();
        let gfn = Gfn::new(1 << 40);
        assert_eq!(table.lookup(gfn), None);
        let what = install(1, 3, Writes::Fault);
        assert_eq!(table.install(gfn, what, &mut spare), None);
        assert_eq!(table.lookup(Gfn::new(u64::MAX)), None);
    }
}
