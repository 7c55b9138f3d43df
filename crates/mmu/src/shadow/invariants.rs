//! The rules of shadow pages, as a checker.
//!
//! 1. Links lead to pages that exist, of one level less; each page counts the links to it.
//! 2. The reverse maps list every leaf, and nothing else.
//! 3. A leaf that takes writes maps no protected frame; a large leaf lies in no block with one.
//! 4. The present entries of a protected table equal the guest's but for A and D.
//! 5. A table is protected, or in the list of the unsynchronised, never both.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use addr::{Frame, Hfn};
use x86::paging::Pte;

use super::Shadow;
use super::entry::Entry;
use super::state::{EntryRef, NumberMap, Page, PageId, Source, State, block_of};
use super::sync::guest_entry;
use crate::mmu::lock;

impl Shadow {
    /// Checks all rules; nobody may translate meanwhile.
    pub(crate) fn check_invariants(&self) -> Result<(), String> {
        let state = lock(&self.state);
        let mut links = HashMap::<PageId, usize>::new();
        let mut leaves = 0;
        for (id, page) in state.pages.iter().enumerate() {
            let Some(page) = page else { continue };
            for index in 0..page.memory.len() {
                let entry = Entry(page.memory.entry(index).load(Ordering::Acquire));
                let at = EntryRef { page: id, index };
                if entry.is_leaf() {
                    leaves += state.check_leaf(at, entry)?;
                } else if entry.is_link() {
                    *links.entry(state.check_link(page, entry)?).or_default() += 1;
                }
                state.check_in_step(page, index, entry)?;
            }
        }
        state.check_links(&links)?;
        let listed: usize = state
            .frames
            .values()
            .chain(state.blocks.values())
            .map(Vec::len)
            .sum();
        if listed != leaves {
            return Err(format!("{leaves} leaves, {listed} in the reverse maps"));
        }
        state.check_tables()
    }
}

impl State {
    /// Returns how often the reverse maps must list the leaf.
    fn check_leaf(&self, at: EntryRef, leaf: Entry) -> Result<usize, String> {
        let pages = self.leaf_pages(at);
        let first = leaf.frame().number();
        if pages == 1 {
            if leaf.host_writable() && self.is_protected(leaf.frame()) {
                return Err(format!("{at:?} takes writes to a protected table"));
            }
            let listed = self
                .frames
                .get(&leaf.frame())
                .is_some_and(|l| l.contains(&at));
            return if listed {
                Ok(1)
            } else {
                Err(format!("{at:?} is not listed"))
            };
        }
        let blocks = block_of(leaf.frame())..=block_of(Hfn::new(first + pages - 1));
        let mut count = 0;
        for block in blocks {
            if self.protected_blocks.contains_key(&block) {
                return Err(format!("large leaf {at:?} beside a protected table"));
            }
            if !self.blocks.get(&block).is_some_and(|l| l.contains(&at)) {
                return Err(format!(
                    "large leaf {at:?} is not listed in block {block:#x}"
                ));
            }
            count += 1;
        }
        Ok(count)
    }

    fn check_link(&self, page: &Page, link: Entry) -> Result<PageId, String> {
        let id = *self
            .by_address
            .get(&link.address())
            .ok_or_else(|| format!("{:?} links to nothing", page.key))?;
        let child = self
            .pages
            .get(id)
            .and_then(Option::as_ref)
            .ok_or("a stale id")?;
        if child.key.level + 1 != page.key.level {
            return Err(format!("{:?} links to {:?}", page.key, child.key));
        }
        Ok(id)
    }

    fn check_links(&self, links: &HashMap<PageId, usize>) -> Result<(), String> {
        for (id, page) in self.pages.iter().enumerate() {
            let Some(page) = page else { continue };
            let found = links.get(&id).copied().unwrap_or(0);
            if found != page.links {
                return Err(format!(
                    "{:?}: {found} links, {} counted",
                    page.key, page.links
                ));
            }
        }
        Ok(())
    }

    fn check_in_step(&self, page: &Page, index: usize, entry: Entry) -> Result<(), String> {
        let Source::Table(frame) = page.key.source else {
            return Ok(());
        };
        if !entry.is_present() || !self.is_protected(frame) {
            return Ok(());
        }
        let known = page.memory.guest(index).load(Ordering::Acquire);
        let now = guest_entry(frame, index, page.key.format).unwrap_or(0);
        let ignored = (Pte::A | Pte::D).bits();
        if (known ^ now) & !ignored == 0 {
            return Ok(());
        }
        let hva = frame.start();
        Err(format!(
            "protected table at {hva:?}, entry {index}: {known:#x} is {now:#x}"
        ))
    }

    fn check_tables(&self) -> Result<(), String> {
        let mut blocks = NumberMap::<u64, usize>::default();
        for (frame, table) in &self.tables {
            if table.protected {
                *blocks.entry(block_of(*frame)).or_default() += 1;
            }
            if table.protected == self.unsync.contains(frame) {
                return Err(format!("{frame:?} is {table:?} and in the wrong list"));
            }
        }
        if blocks == self.protected_blocks {
            Ok(())
        } else {
            Err(format!(
                "{blocks:?} protected, {:?} counted",
                self.protected_blocks
            ))
        }
    }
}
