//! `SYSCALL`, `SYSRET`, `SYSENTER`, `SYSEXIT` (SDM 3A, 6.8.7 and 6.8.8; APM 2, 6.1).
//!
//! No descriptor is read: the segments are flat by definition.

use iced_x86::{Instruction, Mnemonic};
use x86::control::Efer;
use x86::descriptor::attributes;
use x86::rflags;

use super::fault::{general, undefined};
use super::offer::Instructions;
use super::{Abort, Context, Effects, Next};
use crate::state::{Segment, gpr};

/// What a fixed segment is for.
#[derive(Clone, Copy)]
enum Use {
    Code64,
    Code32,
    Stack,
}

/// A flat segment of a level.
fn flat(selector: u64, level: u16, purpose: Use) -> Segment {
    let base = attributes::P | attributes::S | attributes::G | attributes::ACCESSED;
    let kind = match purpose {
        Use::Code64 => attributes::CODE | attributes::WRITABLE_READABLE | attributes::L,
        Use::Code32 => attributes::CODE | attributes::WRITABLE_READABLE | attributes::DB,
        Use::Stack => attributes::WRITABLE_READABLE | attributes::DB,
    };
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: selector as u16 & !3 | level,
        attributes: base | kind | level << attributes::DPL_SHIFT,
        unusable: false,
    }
}

/// What `SYSRET` takes from R11.
pub(crate) const SYSRET_FLAGS: u64 = rflags::ALL & !(rflags::RF | rflags::VM);

/// CS and SS after `SYSCALL` in long mode, and after a 64-bit `SYSRET`.
pub(crate) fn syscall_segments(star: u64) -> ([Segment; 2], [Segment; 2]) {
    let (kernel, user) = (star >> 32, star >> 48);
    (
        [
            flat(kernel, 0, Use::Code64),
            flat(kernel + 8, 0, Use::Stack),
        ],
        [
            flat(user + 16, 3, Use::Code64),
            flat(user + 8, 3, Use::Stack),
        ],
    )
}

impl Context<'_> {
    fn put_flat(&mut self, cs: Segment, ss: Segment, rip: u64) -> Next {
        self.state.segments.cs = cs;
        self.state.segments.ss = ss;
        self.state.rip = rip;
        self.effects |= Effects::MODE | Effects::SEGMENTS | Effects::JUMP;
        Next::Jump
    }

    /// `SYSCALL`.
    pub(super) fn syscall(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.efer_has(Efer::SCE) || !self.state.is_protected() {
            return Err(undefined());
        }
        let next = self.next_rip(instruction);
        let long = self.state.is_long_active();
        let old = self.state.rflags;
        let state = &mut *self.state;
        let selector = state.msrs.star >> 32;
        let (rip, code, clear) = if long {
            let wide = state.segments.cs.attributes & attributes::L != 0;
            state.gpr[gpr::RCX] = next;
            state.gpr[11] = old & !rflags::RF;
            let rip = if wide {
                state.msrs.lstar
            } else {
                state.msrs.cstar
            };
            (rip, Use::Code64, state.msrs.sfmask)
        } else {
            state.gpr[gpr::RCX] = next & 0xffff_ffff;
            (
                state.msrs.star & 0xffff_ffff,
                Use::Code32,
                rflags::IF | rflags::VM,
            )
        };
        state.rflags = state.rflags & !(clear | rflags::RF) | rflags::FIXED;
        if old & rflags::TF != 0 && state.rflags & rflags::TF == 0 {
            self.effects |= Effects::DELIVERED;
        }
        self.note_flags(old);
        let cs = flat(selector, 0, code);
        Ok(self.put_flat(cs, flat(selector + 8, 0, Use::Stack), rip))
    }

    /// `SYSRET`.
    pub(super) fn sysret(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.efer_has(Efer::SCE) || !self.state.is_protected() {
            return Err(undefined());
        }
        self.require_cpl0()?;
        let old = self.state.rflags;
        let selector = self.state.msrs.star >> 48;
        let rcx = self.state.gpr[gpr::RCX];
        let wide = instruction.mnemonic() == Mnemonic::Sysretq;
        if wide && !self.state.is_canonical(rcx) {
            return Err(general());
        }
        if self.state.is_long_active() {
            let image = self.state.gpr[11];
            self.state.rflags = image & SYSRET_FLAGS | rflags::FIXED;
        } else {
            self.state.rflags |= rflags::IF;
        }
        self.note_flags(old);
        let ss = flat(selector + 8, 3, Use::Stack);
        Ok(if wide {
            self.put_flat(flat(selector + 16, 3, Use::Code64), ss, rcx)
        } else {
            self.put_flat(flat(selector, 3, Use::Code32), ss, rcx & 0xffff_ffff)
        })
    }

    /// `SYSENTER`.
    pub(super) fn sysenter(&mut self) -> Result<Next, Abort> {
        if !self.offer.instructions.contains(Instructions::SYSENTER) {
            return Err(undefined());
        }
        let selector = self.state.msrs.sysenter_cs;
        if !self.state.is_protected() || selector & 0xfffc == 0 {
            return Err(general());
        }
        let long = self.state.is_long_active();
        let (code, mask) = if long {
            (Use::Code64, u64::MAX)
        } else {
            (Use::Code32, 0xffff_ffff)
        };
        let old = self.state.rflags;
        self.state.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        self.note_flags(old);
        self.state.gpr[gpr::RSP] = self.state.msrs.sysenter_esp & mask;
        let rip = self.state.msrs.sysenter_eip & mask;
        Ok(self.put_flat(
            flat(selector, 0, code),
            flat(selector + 8, 0, Use::Stack),
            rip,
        ))
    }

    /// `SYSEXIT`.
    pub(super) fn sysexit(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.offer.instructions.contains(Instructions::SYSENTER) {
            return Err(undefined());
        }
        let selector = self.state.msrs.sysenter_cs;
        if !self.state.is_protected() || selector & 0xfffc == 0 || self.state.cpl() != 0 {
            return Err(general());
        }
        let (rip, rsp) = (self.state.gpr[gpr::RDX], self.state.gpr[gpr::RCX]);
        if instruction.mnemonic() == Mnemonic::Sysexitq {
            if !self.state.is_canonical(rip) || !self.state.is_canonical(rsp) {
                return Err(general());
            }
            self.state.gpr[gpr::RSP] = rsp;
            let ss = flat(selector + 40, 3, Use::Stack);
            return Ok(self.put_flat(flat(selector + 32, 3, Use::Code64), ss, rip));
        }
        self.state.gpr[gpr::RSP] = rsp & 0xffff_ffff;
        let ss = flat(selector + 24, 3, Use::Stack);
        Ok(self.put_flat(flat(selector + 16, 3, Use::Code32), ss, rip & 0xffff_ffff))
    }
}
