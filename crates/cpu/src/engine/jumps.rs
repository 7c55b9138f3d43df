//! Indirect jumps: from an address to its block without leaving translated code.
//!
//! A table in the frame, one for each view, is indexed by bits of the target. An entry leads to code
//! that checks whether its block is the one that is meant: RIP, then the page, then `go`. Where RIP or
//! the page is another, it goes on to the next block of the same slot, and the last of them to the
//! stub that leaves. So blocks whose addresses share a slot cost each other a comparison, not an exit.
//!
//! Invariants: a block stands in one slot, at most once ([`Chains`] knows which do), and the jump
//! behind its check leads to the block that was put there before it. A block that is void stays: the
//! number of its page is never in the instruction TLB again.

use std::collections::HashMap;

use super::blocks::{Indirect, WordHasher, check_of};
use super::frame::{JUMP_ENTRIES, View, frame_disp};
use super::vcpu::Vcpu;
use crate::emit::asm::{Cond, Width};
use crate::emit::{Asm, Mem, Reg};
use crate::translate::{Mode, PageCheck, SCRATCH, T0, emit_page_check};

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

/// What the code of an indirect entry is made from.
struct Checks {
    rip: u64,
    mode: Mode,
    page: PageCheck,
    flags_live: bool,
    /// Addresses.
    plain: u64,
    miss: u64,
}

/// Writes an entry; the offset of the displacement of its jump to the next one. Until the block is
/// known to be the one that is meant, nobody knows whether flags are live.
fn emit_entry(asm: &mut Asm, checks: &Checks) -> usize {
    let minus = checks.rip.wrapping_neg();
    if let Ok(minus) = i32::try_from(minus as i64) {
        asm.lea(Width::B64, SCRATCH, Mem::base(T0, minus));
    } else {
        asm.mov_imm(SCRATCH, minus);
        asm.lea(Width::B64, SCRATCH, Mem::indexed(T0, SCRATCH, 0, 0));
    }
    let same = asm.jrcxz();
    let other = asm.jump8(0xeb);
    asm.bind(same);
    emit_page_check(asm, checks.mode, checks.page);
    let there = asm.jrcxz();
    asm.bind(other);
    asm.jmp_to(checks.miss);
    let next = asm.here() - 4;
    asm.bind(there);
    let go = Mem::base(Reg::RSP, frame_disp!(go));
    let asked = if checks.flags_live {
        asm.load(Width::B32, SCRATCH, go);
        asm.jrcxz()
    } else {
        asm.cmp_mem_imm8(go, 0);
        asm.jcc8(Cond::E)
    };
    asm.jmp_to(checks.plain);
    asm.bind(asked);
    asm.jmp_to(checks.miss);
    next
}

impl Vcpu {
    /// Empties the tables of indirect jumps.
    pub(super) fn forget_jumps(&mut self) {
        for view in View::ALL {
            self.forget_jumps_of(view);
        }
    }

    pub(super) fn forget_jumps_of(&mut self, view: View) {
        let stub = self.cache.base() + u64::from(self.indirect_stub);
        self.frame_mut().jumps[view as usize].fill(stub);
        self.chains.clear(view);
    }

    /// The entry of a block for indirect jumps, with the target in `T0`.
    fn indirect_entry(&mut self, number: u32) -> Indirect {
        let block = self.blocks.blocks[number as usize];
        if let Some(indirect) = block.indirect {
            return indirect;
        }
        let key = self.blocks.pages[block.page as usize - 1].key;
        let base = self.cache.base();
        let checks = Checks {
            rip: block.rip,
            mode: key.context.mode,
            page: check_of(key.gvn, block.page),
            flags_live: block.flags_live,
            plain: base + u64::from(block.plain),
            miss: base + u64::from(self.indirect_stub),
        };
        let mut next = 0;
        let entry = self.emit(|asm, _| next = emit_entry(asm, &checks));
        let indirect = Indirect {
            entry,
            next: entry + next as u32,
        };
        self.blocks.blocks[number as usize].indirect = Some(indirect);
        indirect
    }

    /// Lets indirect jumps to this block find it.
    pub(super) fn remember_jump(&mut self, number: u32) {
        let rip = self.blocks.blocks[number as usize].rip;
        let indirect = self.indirect_entry(number);
        let base = self.cache.base();
        let view = self.context.mode.view() as usize;
        let at = (rip >> 1) as usize % JUMP_ENTRIES;
        let mut head = (self.frame().jumps[view][at] - base) as u32;
        let chain = self.chains.by_slot[view].entry(at as u16).or_default();
        if chain.contains(&number) {
            return;
        }
        if chain.len() == LONGEST {
            chain.clear();
            head = self.indirect_stub;
        }
        chain.push(number);
        self.cache.patch_jump(indirect.next, head);
        self.frame_mut().jumps[view][at] = base + u64::from(indirect.entry);
    }
}
