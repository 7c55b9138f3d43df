//! CALL and RET, by the host's own.
//!
//! A guest's return is an indirect jump like any other (`engine::jumps`): an address is popped and
//! looked up. But the host would predict such a jump from what jumped lately, which fails where
//! functions have many callers or call themselves, and differs from one run of the same program to the
//! next. Calls and returns have a predictor of their own, the return stack; it learns from `call` and
//! `ret` alone. So the two are used, and for nothing but that:
//!
//! ```text
//!   call                                   ret
//!     guest's return address to its stack    guest's return address from its stack
//!     call  target - 5                       push  [table of indirect jumps]
//!   landing:                                 ret
//!     is it this address, is it this page?
//!     jmp   block behind the guest's call
//!   ...
//!     lea   rsp, [rsp + 8]                 ; 5 bytes in front of every block
//!   target:
//! ```
//!
//! What the host's `call` writes is dropped at once and never read: its address was learned, that is
//! all. It lands on the eight bytes below `rsp`, in the frame ([`SCRAP`]). `ret` goes to what was pushed
//! the moment before, whatever the predictor thought. There is no second stack that could overflow or
//! disagree with the guest's: where the guest returns to an address that it never called from, switches
//! stacks or jumps out of many frames, the prediction is wrong, as it is on the bare CPU.
//!
//! It is right where the table leads to the place behind the host's `call`. This *landing* is thus the
//! entry for indirect jumps of the block there; and where several blocks hold the same call, they share
//! the first one's host `call`, so that there is one landing only.

use iced_x86::Instruction;

use super::branch::target_of;
use super::registers::tmp;
use super::{Block, Branch, By, Flow, Mode, PageCheck, Reason, SCRATCH, T0, T1};
use crate::emit::asm::{Fixup, Width};
use crate::emit::{Asm, Mem, Reg};
use crate::engine::frame::{BIAS, Frame, frame_disp};

/// Bytes of the instruction that drops a host return address, in front of every block.
pub(crate) const DROP: u32 = 5;

/// Where the host's return addresses go to, off the start of the frame: registers of the guest that
/// live in the host's while translated code runs.
const SCRAP: usize = BIAS - 8;
const _: () = {
    let rax = core::mem::offset_of!(Frame, state.gpr);
    assert!(rax <= SCRAP && SCRAP + 8 <= rax + 2 * 8);
};

/// Where a call returns to that ends a block, and stays on its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReturnSite {
    pub(crate) page: PageCheck,
    /// Address of the stub for indirect jumps that no table knows.
    pub(crate) miss: u64,
    /// The host call that leads there already, by its offset in the cache.
    pub(crate) shared: Option<u32>,
}

/// The code behind a host call, by offsets in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Landing {
    pub(crate) call: u32,
    pub(crate) entry: u32,
    /// The displacement of the jump that is taken where this isn't the address or the page.
    pub(crate) next: u32,
}

/// What code that indirect jumps lead to must look at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
    pub(crate) page: PageCheck,
    /// Where to go if it isn't this address, this page, or attention is asked for.
    pub(crate) miss: u64,
}

/// Drops the return address that the host's `call` has written. Keeps flags.
pub(crate) fn emit_drop(asm: &mut Asm) {
    // lea rsp, [rsp + 8]: written so often that it isn't encoded anew.
    asm.bytes(&[0x48, 0x8d, 0x64, 0x24, 8]);
}

/// Ways out of what [`emit_arrival`] writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived {
    /// The jump that is taken if all is as it should be.
    pub(crate) on: Fixup,
    /// The displacement of the other one, by its offset in the code.
    pub(crate) next: usize,
}

/// Looks whether the address in `T0` is this one, its page is as it was, and nobody asks for
/// attention. Keeps flags: whose they are is not known yet. `T0` is as before, and `T1` too unless the
/// address is this one.
pub(crate) fn emit_arrival(asm: &mut Asm, arrival: &Arrival) -> Arrived {
    let minus = arrival.rip.wrapping_neg();
    let elsewhere = match i32::try_from(minus as i64) {
        Ok(minus) if minus < i32::MAX => asm.unless_zero(Mem::base(T0, minus)),
        _ => {
            asm.mov_imm(SCRATCH, minus);
            asm.unless_zero(Mem::indexed(T0, SCRATCH, 0, 0))
        }
    };
    // Twice the number of the page, and `go`, which is 0 or 1: one sum for both.
    let number = super::page_slot(arrival.mode, arrival.page);
    asm.load(Width::B32, SCRATCH, number);
    asm.load(Width::B32, T1, Mem::base(Reg::RSP, frame_disp!(go)));
    let minus = -(2 * arrival.page.id as i32 + 1);
    let stale = asm.unless_zero(Mem::indexed(T1, SCRATCH, 1, minus));
    let on = asm.jmp();
    asm.bind(elsewhere);
    asm.bind(stale);
    asm.jmp_to(arrival.miss);
    let next = asm.here() - 4;
    Arrived { on, next }
}

impl Block<'_> {
    pub(super) fn call(&mut self, instruction: &Instruction, next: u64) -> Flow {
        let target = target_of(instruction);
        if !self.reach.contains(target) {
            // The push faults first, where it does; the fault of the target takes it back.
            self.asm.mov_imm(T0, target);
            return self.push_and_branch(operand_bytes(instruction), next);
        }
        if target <= self.rip {
            if self.mode.is_64() {
                self.poll();
            } else {
                self.poll_before_call();
            }
        }
        let size = operand_bytes(instruction);
        self.push_return(size, next);
        if self.finish_bounced(target) {
            return Flow::Ended;
        }
        match self.returns {
            // Who calls the next instruction wants to know where he is, and doesn't return.
            Some(to) if target != next => {
                if let Some(call) = self.host_call(to, next) {
                    let by = By::Call;
                    let site = self.site(
                        target,
                        Reason::Link {
                            patch: call + 1,
                            by,
                        },
                    );
                    self.exit(site);
                }
            }
            _ => self.link(target),
        }
        Flow::Ended
    }

    /// The host's call and its landing. Unless another block has done it all: the offset of the call,
    /// which leads to what is emitted next, with its return address dropped.
    fn host_call(&mut self, to: ReturnSite, next: u64) -> Option<u32> {
        if let Some(call) = to.shared {
            self.asm.jmp_to(self.leave + u64::from(call));
            return None;
        }
        let call = self.here();
        let hole = self.asm.call();
        let entry = self.here();
        let arrival = Arrival {
            rip: next,
            mode: self.mode,
            page: to.page,
            miss: to.miss,
        };
        let arrived = emit_arrival(self.asm, &arrival);
        self.landing = Some(Landing {
            call,
            entry,
            next: self.start + arrived.next as u32,
        });
        self.link_stub(arrived.on, next);
        self.asm.bind(hole);
        emit_drop(self.asm);
        Some(call)
    }

    fn push_return(&mut self, size: u32, next: u64) {
        let place = self.push_slot(size);
        self.store_constant(Width::of_bytes(size), place, next);
        self.move_stack(-(size as i32));
    }

    /// Commits a bounced instruction that ends its block; whether it did.
    fn finish_bounced(&mut self, target: u64) -> bool {
        if self.must_commit {
            let site = self.site(target, Reason::Commit);
            self.exit(site);
        }
        self.must_commit
    }

    pub(super) fn indirect_call(&mut self, instruction: &Instruction, next: u64) -> Flow {
        self.load_target(instruction);
        self.push_and_branch(operand_bytes(instruction), next)
    }

    /// Goes on at the address in `T0`, once the return address is pushed.
    fn push_and_branch(&mut self, size: u32, next: u64) -> Flow {
        self.asm.store(Width::B64, tmp(0), T0);
        let place = self.push_slot(size);
        // What the return address replaces comes back if the target can't be reached.
        let width = Width::of_bytes(size);
        self.asm.load(width, SCRATCH, place);
        let undo = Mem::base(Reg::RSP, frame_disp!(overwritten));
        self.asm.store(Width::B64, undo, SCRATCH);
        self.store_constant(width, place, next);
        self.move_stack(-(size as i32));
        self.asm.load(Width::B64, T0, tmp(0));
        if self.must_commit {
            return self.exit_here(Reason::CommitIndirect);
        }
        self.note_branch(Branch {
            moved: -(size as i32),
            pushed: size as u8,
        });
        // The table's entries are for jumps, too: the call leads to a jump that is told apart by
        // where it stands.
        let returns = self.returns;
        if returns.is_none_or(|to| self.host_call(to, next).is_some()) {
            self.indirect_in(self.mode.view());
        }
        Flow::Ended
    }

    pub(super) fn ret(&mut self, instruction: &Instruction) -> Flow {
        let extra = if instruction.op_count() == 1 {
            i32::from(instruction.immediate16())
        } else {
            0
        };
        let size = instruction.stack_pointer_increment().unsigned_abs() - extra as u32;
        let place = self.pop_slot(size);
        self.asm
            .load_zero_extended(Width::of_bytes(size), T0, place);
        let moved = size as i32 + extra;
        self.move_stack(moved);
        self.note_branch(Branch { moved, pushed: 0 });
        let entry = self.table_entry(self.mode.view());
        self.asm.push_mem(entry);
        self.asm.ret();
        Flow::Ended
    }
}

fn operand_bytes(instruction: &Instruction) -> u32 {
    instruction.stack_pointer_increment().unsigned_abs()
}
