//! `MOVS`, `STOS` and `LODS` of 64-bit code, upwards (SDM 2A, `REP`).
//!
//! A repetition whose whole run lies in one page on each side, both in the inline TLB, is done by the
//! host's own `rep` on host addresses:
//!
//! ```text
//!   (DF is clear, and the count 1 to 4096; else cold)
//!   (rsi .. rsi + count * size is in the TLB for reading, t0 its addend)
//!   (rdi .. rdi + count * size is in the TLB for writing, t1 its addend)
//!   lea rsi, [rsi + t0];  lea rdi, [rdi + t1];  mov rcx, r9
//!   rep movs
//!   (back again by the complements)
//! ```
//!
//! All else is cold, and run in Rust (`engine::strings`), from where it stands. Flags are kept. A trap
//! of the host in the `rep` itself finds host addresses in rsi and rdi; `t0` and `t1` are as they were,
//! and [`StringMark`] tells the engine to put the registers right.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::address::SS;
use super::registers::GUEST_RCX;
use super::{Block, Cold, Flow, Mode, Reason, SCRATCH, T0, T1, Use};
use crate::emit::asm::{Cond, Map, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::{TLB_MASK, frame_disp};

/// The data segment's number in the encoding, for faults.
const DS: u8 = SS + 1;

/// Where the host's `rep` of a translation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StringMark {
    /// Offset into the cache.
    pub(crate) host: u32,
    /// Whether rsi takes part.
    pub(crate) moves: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Move,
    Store,
    Load,
}

#[derive(Clone, Copy, Debug)]
struct StringForm {
    kind: Kind,
    width: Width,
    /// Log2 of the element's size.
    scale: u8,
}

fn form(instruction: &Instruction) -> Option<StringForm> {
    use Mnemonic as M;
    let (kind, width, scale) = match instruction.mnemonic() {
        M::Movsb => (Kind::Move, Width::B8, 0),
        M::Movsw => (Kind::Move, Width::B16, 1),
        M::Movsd => (Kind::Move, Width::B32, 2),
        M::Movsq => (Kind::Move, Width::B64, 3),
        M::Stosb => (Kind::Store, Width::B8, 0),
        M::Stosw => (Kind::Store, Width::B16, 1),
        M::Stosd => (Kind::Store, Width::B32, 2),
        M::Stosq => (Kind::Store, Width::B64, 3),
        M::Lodsb => (Kind::Load, Width::B8, 0),
        M::Lodsw => (Kind::Load, Width::B16, 1),
        M::Lodsd => (Kind::Load, Width::B32, 2),
        M::Lodsq => (Kind::Load, Width::B64, 3),
        _ => return None,
    };
    Some(StringForm { kind, width, scale })
}

fn repeats(instruction: &Instruction) -> bool {
    instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

/// Whether this string instruction is translated here.
pub(super) fn is_inline(instruction: &Instruction, mode: Mode) -> bool {
    if !instruction.is_string_instruction() || !mode.is_64() || mode.has(Mode::STEP | Mode::BOUNCE)
    {
        return false;
    }
    let narrow = (0..instruction.op_count()).any(|i| {
        matches!(
            instruction.op_kind(i),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        )
    });
    let based = matches!(instruction.memory_segment(), Register::FS | Register::GS);
    form(instruction)
        .is_some_and(|f| !(narrow || based || f.kind == Kind::Load && repeats(instruction)))
}

impl Block<'_> {
    /// Translates one of those that [`is_inline`] knows.
    pub(super) fn string(&mut self, instruction: &Instruction) -> Flow {
        let Some(form) = form(instruction) else {
            return self.rust(instruction);
        };
        let index = self.tables.instructions.len() as u32;
        self.tables.instructions.push(*instruction);
        let cold = self.site(self.rip, Reason::Rust { instruction: index });
        let df = Mem::base(Reg::RSP, frame_disp!(df));
        self.asm.load_zero_extended(Width::B8, SCRATCH, df);
        self.cold_unless_zero(cold);
        if repeats(instruction) {
            self.repeated(form, cold);
        } else {
            self.element(form);
        }
        Flow::Next
    }

    /// Leaves by this site unless `rcx` is zero.
    fn cold_unless_zero(&mut self, site: u32) {
        let from = if self.flags_live {
            let zero = self.asm.jrcxz();
            let from = self.asm.jmp();
            self.asm.bind(zero);
            from
        } else {
            self.asm
                .op_reg(Width::B64, Map::One, 0x85, SCRATCH.0, SCRATCH);
            self.asm.jcc(Cond::Ne as u8)
        };
        self.cold.push(Cold {
            from,
            address: T0,
            site,
        });
    }

    fn element(&mut self, form: StringForm) {
        let size = 1 << form.scale;
        if form.kind != Kind::Store {
            let from = self.access(Reg::RSI, size, Use::Read, DS);
            if form.kind == Kind::Load {
                self.asm.load(form.width, Reg::RAX, from);
            } else {
                self.asm.load_zero_extended(form.width, SCRATCH, from);
                self.asm
                    .store(Width::B64, super::registers::tmp(0), SCRATCH);
            }
        }
        if form.kind != Kind::Load {
            let to = self.access(Reg::RDI, size, Use::WriteOnly, 0);
            let value = if form.kind == Kind::Move {
                self.asm.load(Width::B64, SCRATCH, super::registers::tmp(0));
                SCRATCH
            } else {
                Reg::RAX
            };
            self.asm.store(form.width, to, value);
        }
        let moved = |reg| Mem::base(reg, size as i32);
        if form.kind != Kind::Store {
            self.asm.lea(Width::B64, Reg::RSI, moved(Reg::RSI));
        }
        if form.kind != Kind::Load {
            self.asm.lea(Width::B64, Reg::RDI, moved(Reg::RDI));
        }
    }

    fn repeated(&mut self, form: StringForm, cold: u32) {
        // More than fit a page, or none.
        self.asm.lea(Width::B64, SCRATCH, Mem::base(GUEST_RCX, -1));
        self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
        self.cold_unless_zero(cold);
        let moves = form.kind == Kind::Move;
        if moves {
            self.run_addend(T0, Reg::RSI, form.scale, Use::Read, cold);
        }
        self.run_addend(T1, Reg::RDI, form.scale, Use::WriteOnly, cold);
        let sum = |reg, addend, disp| Mem::indexed(reg, addend, 0, disp);
        if moves {
            self.asm.lea(Width::B64, Reg::RSI, sum(Reg::RSI, T0, 0));
        }
        self.asm.lea(Width::B64, Reg::RDI, sum(Reg::RDI, T1, 0));
        self.asm.mov(Width::B64, SCRATCH, GUEST_RCX);
        let host = self.here();
        self.tables.strings.push(StringMark { host, moves });
        self.asm.string(if moves { 0xa5 } else { 0xab }, form.width);
        if moves {
            self.asm.not(T0);
            self.asm.lea(Width::B64, Reg::RSI, sum(Reg::RSI, T0, 1));
        }
        self.asm.not(T1);
        self.asm.lea(Width::B64, Reg::RDI, sum(Reg::RDI, T1, 1));
        self.asm.mov(Width::B64, GUEST_RCX, SCRATCH);
    }

    /// The addend of all that a run touches, which must be in one page of the TLB.
    fn run_addend(&mut self, into: Reg, start: Reg, scale: u8, usage: Use, cold: u32) {
        self.asm.lea(
            Width::B64,
            SCRATCH,
            Mem::indexed(start, GUEST_RCX, scale, -1),
        );
        self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
        self.index_into(into, start);
        if self.flags_live {
            self.asm.load(Width::B64, into, self.tags_at(into, usage));
            self.asm
                .lea(Width::B64, SCRATCH, Mem::indexed(SCRATCH, into, 0, 0));
            self.cold_unless_zero(cold);
            self.index_into(into, start);
        } else {
            let tags = self.tags_at(into, usage);
            self.asm.add_mem(Width::B64, SCRATCH, tags);
            let from = self.asm.jcc(Cond::Ne as u8);
            self.cold.push(Cold {
                from,
                address: T0,
                site: cold,
            });
        }
        let addend = self.addend_at(into);
        self.asm.load(Width::B64, into, addend);
    }

    /// The index of an address in the inline TLB.
    fn index_into(&mut self, into: Reg, address: Reg) {
        if self.flags_live {
            self.asm.mov_imm(into, TLB_MASK);
            self.asm.pext(into, address, into);
        } else {
            self.asm.bextr(into, address, Reg::RSP);
        }
    }
}
