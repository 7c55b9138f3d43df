//! Jumps.
//!
//! A direct jump first leads to a cold stub that leaves; the engine then patches it. An indirect jump
//! goes through a table of entries selected by bits of the target; each entry's code begins with a
//! check that it is the one that is meant (see `engine::blocks`). Before a jump backward, and behind
//! every indirect one, the word `go` is polled.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use super::address::segment_of;
use super::form::{Form, Traits};
use super::generic::has_memory;
use super::registers::{GUEST_RCX, number, tmp};
use super::{Block, Branch, By, Flow, Mode, Reason, SCRATCH, SITE_INDIRECT, T0, Use};
use crate::emit::asm::{Cond, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::frame_disp;
use crate::system::Vendor;

/// Whether nothing behind this instruction belongs to its block.
pub(super) fn ends_block(instruction: &Instruction, form: &Form, mode: Mode) -> bool {
    if !form.traits.contains(Traits::MAY_END) {
        return false;
    }
    instruction.flow_control() != FlowControl::Next && !is_side_exit(instruction)
        || instruction.is_invalid()
        || crate::system::is_system(instruction) && !super::inline::continues(instruction)
        || super::special::is_rust(instruction, mode)
}

/// Whether the block goes on behind this branch: it is conditional, and no loop is closed by it.
pub(super) fn is_side_exit(instruction: &Instruction) -> bool {
    instruction.is_jcc_short_or_near() && target_of(instruction) > instruction.ip()
}

/// Whether this branch may close a loop, and is polled in front of.
pub(super) fn is_backward(instruction: &Instruction) -> bool {
    let flow = instruction.flow_control();
    matches!(
        flow,
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    ) && !is_side_exit(instruction)
}

/// `jrcxz`, or `jecxz`, or after an increment of the counter `loop`.
const JCXZ: u8 = 0xe3;

impl Block<'_> {
    /// Goes on at `target`, by a jump that will be chained.
    pub(super) fn link(&mut self, target: u64) {
        let hole = self.asm.jmp();
        self.link_stub(hole, target);
    }

    pub(super) fn link_stub(&mut self, hole: crate::emit::Fixup, target: u64) {
        let patch = self.start + hole.offset() as u32;
        let site = if self.reach.contains(target) {
            let by = By::Jump;
            self.site(target, Reason::Link { patch, by })
        } else {
            self.site(self.rip, super::GENERAL_PROTECTION)
        };
        self.cold.push(super::Cold {
            from: hole,
            address: T0,
            site,
        });
    }

    fn link_if(&mut self, cond: u8, target: u64) {
        let hole = self.asm.jcc(cond);
        self.link_stub(hole, target);
    }

    /// Leaves before the present instruction if somebody asks for attention. What follows up to the
    /// block's end, or to the next check of an access, must be short: the way out stands there.
    pub(super) fn poll(&mut self) {
        if self.polled {
            return;
        }
        self.polled = true;
        let site = self.site(self.rip, Reason::Poll);
        let go = Mem::base(Reg::RSP, frame_disp!(go));
        if self.flags_live {
            self.asm.load(Width::B32, SCRATCH, go);
            self.near = Some((self.asm.jrcxz(), site));
        } else {
            self.asm.cmp_mem_imm8(go, 0);
            let from = self.asm.jcc(Cond::E as u8);
            if self.loop_poll(from, site) {
                return;
            }
            self.cold.push(super::Cold {
                from,
                address: T0,
                site,
            });
        }
    }

    /// The same where much code follows.
    pub(super) fn poll_before_call(&mut self) {
        let site = self.site(self.rip, Reason::Poll);
        self.asm
            .load(Width::B32, SCRATCH, Mem::base(Reg::RSP, frame_disp!(go)));
        let asked = self.asm.jrcxz();
        let on = self.asm.jump8(0xeb);
        self.asm.bind(asked);
        self.exit(site);
        self.asm.bind(on);
    }

    fn poll_backward(&mut self, target: u64) {
        if target <= self.rip {
            self.poll();
        }
    }

    /// Notes an indirect branch for the case that its target can't be reached.
    pub(super) fn note_branch(&mut self, done: Branch) {
        let site = self.site(self.rip, Reason::Branch(done));
        let note = Mem::base(Reg::RSP, frame_disp!(branch));
        self.asm.store_imm(Width::B32, note, site as i32);
    }

    /// What follows is not an indirect branch, whose fault a bad target would be.
    pub(super) fn forget_branch(&mut self) {
        let note = Mem::base(Reg::RSP, frame_disp!(branch));
        self.asm.store_imm(Width::B32, note, SITE_INDIRECT as i32);
    }

    /// Translates a branch; `None` if it isn't one.
    pub(super) fn branch(&mut self, instruction: &Instruction) -> Option<Flow> {
        let next = self.truncate_ip(instruction.next_ip());
        Some(match instruction.flow_control() {
            FlowControl::UnconditionalBranch => {
                let target = target_of(instruction);
                self.poll_backward(target);
                self.link(target);
                Flow::Ended
            }
            FlowControl::ConditionalBranch => self.conditional(instruction, next),
            FlowControl::Call => self.call(instruction, next),
            FlowControl::IndirectBranch => {
                self.load_target(instruction);
                self.note_branch(Branch {
                    moved: 0,
                    pushed: 0,
                });
                self.indirect_in(self.mode.view())
            }
            FlowControl::IndirectCall => self.indirect_call(instruction, next),
            FlowControl::Return => self.ret(instruction),
            _ => return None,
        })
    }

    fn conditional(&mut self, instruction: &Instruction, next: u64) -> Flow {
        let target = target_of(instruction);
        if is_side_exit(instruction) {
            let condition = condition_of(instruction);
            if !self.branch_ahead(condition, target) {
                self.link_if(condition, target);
            }
            return Flow::Next;
        }
        self.poll_backward(target);
        match instruction.mnemonic() {
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
                self.looping(instruction, target, next);
            }
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
                self.counter_to_scratch(instruction);
                let taken = self.asm.jump8(JCXZ);
                self.link(next);
                self.asm.bind(taken);
                self.link(target);
            }
            _ => {
                self.close_loop(condition_of(instruction), target, next);
            }
        }
        Flow::Ended
    }

    /// The branch of a loop that is translated twice leads to, or stays in, the second translation.
    fn close_loop(&mut self, cond: u8, target: u64, next: u64) {
        if self.looping.is_some() {
            self.loop_branch(cond);
            return;
        }
        if self.loops {
            self.back = Some(self.asm.jcc(cond));
        } else {
            self.link_if(cond, target);
        }
        self.link(next);
    }

    /// The counter, zero-extended, in the host's rcx.
    fn counter_to_scratch(&mut self, instruction: &Instruction) {
        match counter_bytes(instruction) {
            2 => self.asm.movzx(Width::B16, SCRATCH, GUEST_RCX),
            4 => self.asm.mov(Width::B32, SCRATCH, GUEST_RCX),
            _ => self.asm.mov(Width::B64, SCRATCH, GUEST_RCX),
        }
    }

    /// `LOOP` and its kin, without a change of flags.
    fn looping(&mut self, instruction: &Instruction, target: u64, next: u64) {
        let bytes = counter_bytes(instruction);
        let width = Width::of_bytes(bytes);
        let faults = !self.reach.contains(target);
        if faults {
            self.asm.store(Width::B64, tmp(0), GUEST_RCX);
        }
        self.asm.lea(width, GUEST_RCX, Mem::base(GUEST_RCX, -1));
        let wants_zero = match instruction.mnemonic() {
            Mnemonic::Loop => None,
            // On AMD's CPUs the repeat prefixes choose the condition.
            _ if self.vendor == Vendor::Amd && instruction.has_repne_prefix() => Some(false),
            _ if self.vendor == Vendor::Amd && instruction.has_rep_prefix() => Some(true),
            mnemonic => Some(mnemonic == Mnemonic::Loope),
        };
        let early = wants_zero.map(|zero| self.asm.jcc(if zero { 5 } else { 4 }));
        self.counter_to_scratch(instruction);
        let out = self.asm.jump8(JCXZ);
        if faults {
            // The fault leaves the counter as it was.
            self.asm.load(Width::B64, GUEST_RCX, tmp(0));
        }
        self.link(target);
        self.asm.bind(out);
        if let Some(early) = early {
            self.asm.bind(early);
        }
        self.link(next);
    }

    /// The target of an indirect jump or call into `T0`.
    pub(super) fn load_target(&mut self, instruction: &Instruction) {
        let (from, size) = if has_memory(instruction) {
            let size = instruction.memory_size().size() as u32;
            let address = self.linear(instruction, size, Use::Read);
            let segment = segment_of(instruction, self.mode);
            (Some(self.access(address, size, Use::Read, segment)), size)
        } else {
            (None, instruction.op0_register().size() as u32)
        };
        let width = Width::of_bytes(size);
        if let Some(m) = from {
            self.asm.load_zero_extended(width, T0, m);
            return;
        }
        let value = self.value_in(number(instruction.op0_register()), T0);
        match width {
            Width::B16 => self.asm.movzx(width, T0, value),
            Width::B32 => self.asm.mov(Width::B32, T0, value),
            _ => self.asm.mov(Width::B64, T0, value),
        }
    }
}

pub(super) fn target_of(instruction: &Instruction) -> u64 {
    match instruction.op0_kind() {
        OpKind::NearBranch16 => u64::from(instruction.near_branch16()),
        OpKind::NearBranch32 => u64::from(instruction.near_branch32()),
        _ => instruction.near_branch64(),
    }
}

/// The width of the counter of `LOOP` and `JCXZ`.
fn counter_bytes(instruction: &Instruction) -> u32 {
    use iced_x86::Code as C;
    match instruction.code() {
        C::Jcxz_rel8_16
        | C::Jcxz_rel8_32
        | C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Jrcxz_rel8_16
        | C::Jrcxz_rel8_64
        | C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// The condition as the encoding numbers it.
fn condition_of(instruction: &Instruction) -> u8 {
    (instruction.condition_code() as u8).saturating_sub(1)
}
