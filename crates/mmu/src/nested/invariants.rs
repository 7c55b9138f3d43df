//! The rules of the second level, as a checker.
//!
//! 1. Every entry is in one of the legal states of [`super::entry`] for its level.
//! 2. No table that is linked holds a frozen entry, and no table is linked twice.
//! 3. The counters equal the pages that are mapped.
//! 4. All tables that are linked are counted as in use by the pool.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::entry::{ENTRIES, Entry, Level, ROOT_LEVEL, State};
use super::pool::TableRef;
use super::table::SecondLevel;

#[derive(Default)]
struct Seen {
    tables: HashSet<u64>,
    pages: [i64; 3],
}

impl SecondLevel {
    /// Checks all rules; nobody may change the second level meanwhile.
    pub(crate) fn check_invariants(&self) -> Result<(), String> {
        let mut seen = Seen::default();
        for cell in &self.root {
            self.check_entry(Entry(cell.load(Ordering::Acquire)), ROOT_LEVEL, &mut seen)?;
        }
        if seen.pages != self.counts.get() {
            let counted = self.counts.get();
            return Err(format!(
                "{:?} pages mapped, {counted:?} counted",
                seen.pages
            ));
        }
        let linked = seen.tables.len() * 4096;
        let in_use = self.bytes();
        if linked > in_use {
            return Err(format!("{linked} bytes linked, {in_use} in use"));
        }
        Ok(())
    }

    fn check_entry(&self, entry: Entry, level: Level, seen: &mut Seen) -> Result<(), String> {
        if !entry.is_legal_at(level) {
            return Err(format!("entry {:#x} at level {level}", entry.0));
        }
        match entry.state() {
            State::Empty => Ok(()),
            State::Frozen => Err(format!("frozen entry at level {level} in a linked table")),
            State::Page(..) => {
                seen.pages[usize::from(level) - 1] += 1;
                Ok(())
            }
            State::Table(address) => {
                if !seen.tables.insert(address) {
                    return Err(format!("table {address:#x} is linked twice"));
                }
                let table = super::table::child(entry).ok_or("not a table")?;
                self.check_table(table, level - 1, seen)
            }
        }
    }

    fn check_table(&self, table: TableRef, level: Level, seen: &mut Seen) -> Result<(), String> {
        (0..ENTRIES).try_for_each(|index| {
            let entry = Entry(table.cell(index).load(Ordering::Acquire));
            self.check_entry(entry, level, seen)
        })
    }
}
