//! An entry of the second level.
//!
//! | state  | bits                        | at levels | meaning                                      |
//! |--------|-----------------------------|-----------|----------------------------------------------|
//! | empty  | 0                           | 1, 2, 3   | nobody asked yet, or taken away              |
//! | frozen | `FROZEN` alone              | 1, 2      | its table is unlinked: start again at the root |
//! | table  | `PRESENT`, `TABLE`, address | 2, 3      | leads to a table of the level below          |
//! | page   | `PRESENT`, host frame       | 1, 2, 3   | maps a page; reads may go on                 |
//! | page   | `PRESENT`, `WRITE`, frame   | 1, 2, 3   | writes may go on, too                        |
//!
//! ```text
//!            install                    write fault
//!   empty ------------> page read-only ------------> page writable
//!     ^  \-----------------------------------------------^  |
//!     |     install for a write                             |
//!     |                   protect (dirty log)               |
//!     |    page read-only <--------------------------------/
//!     |         | split (dirty log)
//!     |         v
//!     \----- table ----> its entries become frozen
//!      zap
//! ```
//!
//! All changes but those of a table that nobody else can see are compare-and-exchange or swap.

use addr::{Frame, Hfn, Hva, PageSize};

/// Levels of the second level: 4 KiB, 2 MiB, 1 GiB.
pub(crate) type Level = u8;
/// The highest level, that of the root's entries.
pub(crate) const ROOT_LEVEL: Level = 3;
/// Entries of a table, and of what one entry splits into.
pub(crate) const ENTRIES: usize = 512;

/// Log2 of the 4 KiB frames that an entry of this level covers.
pub(crate) const fn frame_shift(level: Level) -> u32 {
    9 * (level as u32 - 1)
}

/// The page size that an entry of this level maps.
pub(crate) const fn size_of(level: Level) -> PageSize {
    match level {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const TABLE: u64 = 1 << 2;
const FROZEN: u64 = 1 << 3;
const ADDRESS: u64 = !0xfff;

/// Whether a page takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// They go on.
    Allowed,
    /// They fault.
    Fault,
}

/// One entry, as loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Empty,
    Frozen,
    /// The address of a table.
    Table(u64),
    Page(Hfn, Writes),
}

impl Entry {
    pub(crate) const EMPTY: Self = Self(0);
    pub(crate) const FROZEN: Self = Self(FROZEN);

    /// Maps the page that begins at host frame `frame`.
    pub(crate) fn page(frame: Hfn, writes: Writes) -> Self {
        let write = if writes == Writes::Allowed { WRITE } else { 0 };
        Self(frame.start().raw() | PRESENT | write)
    }

    /// Leads to the table at this address, which is aligned to 4 KiB.
    pub(crate) fn table(address: u64) -> Self {
        debug_assert_eq!(address & !ADDRESS, 0, "tables are aligned");
        Self(address | PRESENT | TABLE)
    }

    /// What it is.
    pub(crate) fn state(self) -> State {
        match self.0 & (PRESENT | TABLE | FROZEN) {
            0 => State::Empty,
            PRESENT => State::Page(Hva::new(self.0 & ADDRESS).frame(), self.writes()),
            f if f & FROZEN != 0 => State::Frozen,
            _ => State::Table(self.0 & ADDRESS),
        }
    }

    /// Whether it maps a page.
    pub(crate) fn is_page(self) -> bool {
        self.0 & (PRESENT | TABLE) == PRESENT
    }

    /// The address of a table, if it is one.
    pub(crate) fn as_table(self) -> Option<u64> {
        (self.0 & (PRESENT | TABLE) == PRESENT | TABLE).then_some(self.0 & ADDRESS)
    }

    /// The number of the first host frame of a page entry.
    pub(crate) fn first_frame(self) -> u64 {
        self.0 >> 12
    }

    pub(crate) fn writes(self) -> Writes {
        if self.0 & WRITE == 0 {
            Writes::Fault
        } else {
            Writes::Allowed
        }
    }

    /// The same page, with this answer to writes.
    pub(crate) fn with_writes(self, writes: Writes) -> Self {
        match writes {
            Writes::Allowed => Self(self.0 | WRITE),
            Writes::Fault => Self(self.0 & !WRITE),
        }
    }

    /// What the `index`th of the entries maps that a page entry of `level` splits into.
    pub(crate) fn fragment(self, level: Level, index: usize) -> Self {
        let bytes = size_of(level - 1).bytes();
        Self(self.0 + index as u64 * bytes)
    }

    /// Whether the state is one of the table above, at this level.
    pub(crate) fn is_legal_at(self, level: Level) -> bool {
        match self.state() {
            State::Empty => self == Self::EMPTY,
            State::Frozen => self == Self::FROZEN && level < ROOT_LEVEL,
            State::Table(address) => {
                level > 1 && address != 0 && self.0 & !(ADDRESS | PRESENT | TABLE) == 0
            }
            State::Page(..) => self.0 & !(ADDRESS | PRESENT | WRITE) == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        let page = Entry::page(Hfn::new(0x7_f001_2345), Writes::Allowed);
        assert_eq!(
            page.state(),
            State::Page(Hfn::new(0x7_f001_2345), Writes::Allowed)
        );
        assert_eq!(page.with_writes(Writes::Fault).writes(), Writes::Fault);
        assert_eq!(Entry::table(0x5000).state(), State::Table(0x5000));
        assert_eq!(Entry::EMPTY.state(), State::Empty);
        assert_eq!(Entry::FROZEN.state(), State::Frozen);
        assert!(!Entry::table(0x5000).is_legal_at(1));
        assert!(!Entry(PRESENT | FROZEN).is_legal_at(1));
    }

    #[test]
    fn fragments_lie_side_by_side() {
        let page = Entry::page(Hfn::new(0x1000), Writes::Fault);
        let last = page.fragment(2, 511);
        assert_eq!(last.state(), State::Page(Hfn::new(0x11ff), Writes::Fault));
    }
}
