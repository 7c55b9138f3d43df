//! Indirect jumps: from an address to its block without leaving translated code.
//!
//! A table in the frame, one for each view, is indexed by bits of the target. An entry leads to code
//! that checks whether its block is the one that is meant: RIP, then the page, then `go`. Where RIP or
//! the page is another, it goes on to the next block of the same slot, and the last of them to the
//! stub that leaves. So blocks whose addresses share a slot cost each other a comparison, not an exit.
//!
//! Invariants: a block stands in one slot, at most once ([`Chains`] knows which do), and the jump
//! behind its check leads to the block that was put there before it. A block that is void stays: the
//! number of its page is never in the instruction TLB again. So does one that was made for another mode
//! of the same view: the number of its page is in the instruction TLB in that mode only. And so does
//! the entry of a block to which a call was found later to return: the call's landing
//! (`translate::calls`) is put in front of it.

use std::collections::HashMap;

use super::blocks::{Block, Indirect, WordHasher, check_of};
use super::frame::{JUMP_ENTRIES, View};
use super::vcpu::Vcpu;
use crate::translate::{Arrival, Landing, emit_arrival};

/// Blocks of one slot; with more than these it begins anew.
const LONGEST: usize = 8;

/// The blocks in each slot.
#[derive(Debug, Default)]
pub(super) struct Chains {
    by_slot: [HashMap<u16, Vec<u32>, std::hash::BuildHasherDefault<WordHasher>>; 3],
}

impl Chains {
    fn clear(&mut self, view: View) {
        self.by_slot[view as usize].clear();
    }
}

/// The entry of a table for an address.
fn slot(rip: u64) -> usize {
    (rip >> 1) as usize % JUMP_ENTRIES
}

impl Vcpu {
    /// Empties the tables of indirect jumps.
    pub(super) fn forget_jumps(&mut self) {
        let stub = self.cache.base() + u64::from(self.indirect_stub);
        for view in View::ALL {
            self.frame_mut().jumps[view as usize].fill(stub);
            self.chains.clear(view);
        }
    }

    /// The entry of a block for indirect jumps, with the target in `T0`.
    fn indirect_entry(&mut self, number: u32) -> Indirect {
        let block = self.blocks.blocks[number as usize];
        if let Some(indirect) = block.indirect {
            return indirect;
        }
        let page = &self.blocks.pages[block.page as usize - 1];
        let indirect = match page.landing(block.offset(page)) {
            Some(Landing { entry, next, .. }) => Indirect { entry, next },
            None => self.emit_indirect(&block),
        };
        self.blocks.blocks[number as usize].indirect = Some(indirect);
        indirect
    }

    fn emit_indirect(&mut self, block: &Block) -> Indirect {
        let key = self.blocks.pages[block.page as usize - 1].key;
        let base = self.cache.base();
        let arrival = Arrival {
            rip: block.rip,
            mode: key.context.mode,
            page: check_of(key.gvn, block.page),
            miss: base + u64::from(self.indirect_stub),
        };
        let mut ways = (0, 0);
        let entry = self.emit(|asm, _| {
            let arrived = emit_arrival(asm, &arrival);
            ways = (arrived.on.offset() as u32, arrived.next as u32);
        });
        let (on, next) = ways;
        self.cache.patch_jump(entry + on, block.plain);
        Indirect {
            entry,
            next: entry + next,
        }
    }

    /// Makes a landing the entry of the block behind the call, if there is one that has another: what
    /// that one is found by goes on to find it, after the landing.
    pub(super) fn land(&mut self, page: u32, offset: u16, landing: Landing) {
        let Some(number) = self.blocks.find(page, offset) else {
            return;
        };
        let block = &mut self.blocks.blocks[number as usize];
        if block.indirect.is_none() {
            return;
        }
        let Landing { entry, next, .. } = landing;
        block.indirect = Some(Indirect { entry, next });
        let rip = block.rip;
        let at = slot(rip);
        let view = self.context.mode.view();
        let chain = self.chains.by_slot[view as usize].get(&(at as u16));
        if chain.is_some_and(|chain| chain.contains(&number)) {
            self.put_in_front(view, at, Indirect { entry, next });
        }
    }

    fn put_in_front(&mut self, view: View, at: usize, indirect: Indirect) {
        let base = self.cache.base();
        let head = (self.frame().jumps[view as usize][at] - base) as u32;
        self.cache.patch_jump(indirect.next, head);
        self.frame_mut().jumps[view as usize][at] = base + u64::from(indirect.entry);
    }

    /// Lets indirect jumps to this block find it.
    pub(super) fn remember_jump(&mut self, number: u32) {
        let rip = self.blocks.blocks[number as usize].rip;
        let indirect = self.indirect_entry(number);
        let view = self.context.mode.view();
        let at = slot(rip);
        let chain = &mut self.chains.by_slot[view as usize];
        let chain = chain.entry(at as u16).or_default();
        if chain.contains(&number) {
            return;
        }
        let full = chain.len() == LONGEST;
        if full {
            chain.clear();
        }
        chain.push(number);
        if full {
            let stub = self.cache.base() + u64::from(self.indirect_stub);
            self.frame_mut().jumps[view as usize][at] = stub;
        }
        self.put_in_front(view, at, indirect);
    }
}
