//! Branches inside a block.
//!
//! A conditional branch forward doesn't end a block. Where it leads to an instruction of the same
//! block, the host's branch leads to that instruction's translation, and nothing has to be translated
//! twice or chained. So the instruction is one that control reaches in two ways: nothing that was
//! worked out in front of it may count behind it (`translate::window`), as far as it isn't the same
//! for both. Every instruction begins with all registers and flags where they belong, so there is
//! nothing else to match.

use iced_x86::Instruction;

use super::Block;
use super::branch::target_of;
use crate::emit::Fixup;

/// Which instructions of a block are reached by branches of its own.
#[derive(Debug, Default)]
pub(super) struct Joins {
    /// For each instruction, whether it is a target.
    targets: Vec<bool>,
    /// For each branch that leads to one.
    inside: Vec<bool>,
    any: bool,
}

impl Joins {
    /// Looks for them, given the numbers of the branches that don't end the block.
    pub(super) fn find(&mut self, instructions: &[Instruction], branches: &[u8]) {
        self.any = false;
        self.targets.clear();
        self.targets.resize(instructions.len(), false);
        self.inside.clear();
        self.inside.resize(instructions.len(), false);
        for index in branches.iter().map(|branch| usize::from(*branch)) {
            let behind = &instructions[index + 1..];
            let target = target_of(&instructions[index]);
            // Most lead but a little further, or out of the block.
            if behind.last().is_none_or(|last| last.ip() < target) {
                continue;
            }
            let found = behind.iter().position(|i| i.ip() >= target);
            if let Some(distance) = found.filter(|at| behind[*at].ip() == target) {
                self.targets[index + 1 + distance] = true;
                self.inside[index] = true;
                self.any = true;
            }
        }
    }

    /// For each instruction, whether it is a target.
    pub(super) fn targets(&self) -> &[bool] {
        &self.targets
    }

    /// Whether any instruction is a target.
    pub(super) fn any(&self) -> bool {
        self.any
    }

    /// Whether this instruction is a target.
    pub(super) fn is_target(&self, index: usize) -> bool {
        self.targets[index]
    }

    /// Whether this instruction is a branch to another.
    fn leads_inside(&self, index: usize) -> bool {
        self.inside[index]
    }
}

/// A branch to an instruction of the block whose translation has not begun yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ahead {
    from: Fixup,
    target: u64,
}

impl Block<'_> {
    /// A branch to an instruction that follows in this block, if that is where it leads.
    pub(super) fn branch_ahead(&mut self, condition: u8, target: u64) -> bool {
        let inside = self.joins.leads_inside(self.index);
        if inside {
            let from = self.asm.jcc(condition);
            self.ahead.push(Ahead { from, target });
        }
        inside
    }

    /// Lets the branches that lead to the present instruction lead here.
    pub(super) fn join(&mut self) {
        let (rip, asm) = (self.rip, &mut *self.asm);
        self.ahead.retain(|ahead| {
            let here = ahead.target == rip;
            if here {
                asm.bind(ahead.from);
            }
            !here
        });
    }

    /// The block has ended before what some branches lead to.
    pub(super) fn leave_by_branches(&mut self) {
        while let Some(Ahead { from, target }) = self.ahead.pop() {
            self.link_stub(from, target);
        }
    }
}
