//! Memory operands: effective address, segment, inline TLB.
//!
//! The check in front of an access is, where flags are dead:
//!
//! ```text
//!   bextr  t1, address, rsp         ; index (see engine::frame for rsp as an operand)
//!   lea    rcx, [address + size-1]
//!   shrx   rcx, rcx, rsp            ; page of the last byte
//!   add    rcx, [rsp + t1*8 + TAGS] ; tags are negated page numbers
//!   jne    cold
//!   mov    t1, [rsp + t1*8 + ADDENDS]
//!   OP     [address + t1]
//! ```
//!
//! The index comes from the first byte and the tag is compared with the last: an access that crosses
//! into another page never hits. Where flags are live, the sum is made by `lea` and tested by
//! `jrcxz`. The cold stub leaves with the address in `t0`; the engine puts the addend into `t1` and
//! goes on behind the check.

use iced_x86::{Instruction, Register};

use super::Mode;
use super::registers::{Home, home, number};
use super::{Access, Block, Cold, Reason, SCRATCH, SegmentClass, T0, T1, Use};
use crate::emit::asm::{Cond, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::{BOUNCE_SLOTS, Frame, InlineTlb, TLB_MASK, disp, frame_disp};
use crate::state::{Segment, Segments};

/// Numbers of segment registers in the encoding.
pub(super) const SS: u8 = 2;

/// Where a segment's base lies in the frame.
pub(super) fn base_slot(segment: u8) -> Mem {
    Mem::base(
        Reg::RSP,
        segment_field(segment, core::mem::offset_of!(Segment, base)),
    )
}

fn limit_slot(segment: u8) -> Mem {
    Mem::base(
        Reg::RSP,
        segment_field(segment, core::mem::offset_of!(Segment, limit)),
    )
}

fn segment_field(segment: u8, field: usize) -> i32 {
    // The six user-visible segments come first in `Segments`, in the encoding's order.
    const { assert!(core::mem::offset_of!(Segments, gs) == 5 * size_of::<Segment>()) };
    frame_disp!(state.segments) + (usize::from(segment) * size_of::<Segment>() + field) as i32
}

/// The number in the encoding of a segment register.
pub(super) fn segment_number(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

/// The segment of the memory operand: in 64-bit mode the prefixes of the first four mean nothing, and
/// only the base register says which fault a bad address raises.
pub(crate) fn segment_of(instruction: &Instruction, mode: Mode) -> u8 {
    let named = segment_number(instruction.memory_segment());
    if !mode.is_64() || named >= 4 {
        return named;
    }
    match instruction.memory_base() {
        Register::RSP | Register::ESP | Register::RBP | Register::EBP => SS,
        _ => 3,
    }
}

/// How wide the addresses of this instruction are, in bits.
pub(crate) fn address_bits(instruction: &Instruction, mode: Mode) -> u32 {
    let by_register = |r: Register| match r {
        r if r.is_gpr64() || r == Register::RIP => 64,
        r if r.is_gpr32() || r == Register::EIP => 32,
        r if r.is_gpr16() => 16,
        _ => 0,
    };
    let base = by_register(instruction.memory_base());
    let index = by_register(instruction.memory_index());
    match base.max(index) {
        0 => match instruction.memory_displ_size() {
            2 => 16,
            4 if !mode.is_64() => 32,
            4 => 32,
            8 => 64,
            _ => mode.code_size().bits(),
        },
        bits => bits,
    }
}

impl Block<'_> {
    /// The operand's effective address in the host's terms; uses `T0` and `T1` for registers that
    /// live in the frame, and for constants.
    fn effective(&mut self, instruction: &Instruction) -> Mem {
        let displacement = instruction.memory_displacement64();
        if instruction.is_ip_rel_memory_operand() {
            self.asm.mov_imm(T0, displacement);
            return Mem::base(T0, 0);
        }
        let base = match instruction.memory_base() {
            Register::None => None,
            r => Some(self.value_in(number(r), T0)),
        };
        let index = match instruction.memory_index() {
            Register::None => None,
            r => {
                let scale = instruction.memory_index_scale().trailing_zeros() as u8;
                Some((self.value_in(number(r), T1), scale))
            }
        };
        if base.is_none() && index.is_none() {
            self.asm.mov_imm(T0, displacement);
            return Mem::base(T0, 0);
        }
        Mem {
            base,
            index,
            disp: displacement as i32,
        }
    }

    /// The effective address, truncated to the address size, in a register: `T0`, or the guest's own
    /// register where that is all there is to it.
    pub(super) fn offset(&mut self, instruction: &Instruction) -> Reg {
        let bits = address_bits(instruction, self.mode);
        let m = self.effective(instruction);
        match (bits, m) {
            (
                64,
                Mem {
                    base: Some(base),
                    index: None,
                    disp: 0,
                },
            ) => base,
            (64, _) => {
                self.asm.lea(Width::B64, T0, m);
                T0
            }
            (32, _) => {
                self.asm.lea(Width::B32, T0, m);
                T0
            }
            _ => {
                self.asm.lea(Width::B32, T0, m);
                self.asm.movzx(Width::B16, T0, T0);
                T0
            }
        }
    }

    /// `LEA`: the effective address into a register of this width.
    pub(super) fn lea(&mut self, instruction: &Instruction) {
        let guest = number(instruction.op0_register());
        let width = Width::of_bytes(instruction.op0_register().size() as u32);
        let bits = address_bits(instruction, self.mode);
        if bits == 16 || (bits == 32 && width == Width::B64) {
            let offset = self.offset(instruction);
            self.assign(width, guest, offset);
            return;
        }
        let m = self.effective(instruction);
        match home(guest) {
            Home::Host(reg) => self.asm.lea(width, reg, m),
            Home::Frame(_) => {
                self.asm.lea(Width::B64, T0, m);
                self.assign(width, guest, T0);
            }
        }
    }

    /// The linear address of the memory operand.
    pub(super) fn linear(&mut self, instruction: &Instruction, size: u32, usage: Use) -> Reg {
        let segment = segment_of(instruction, self.mode);
        let offset = self.offset(instruction);
        self.add_segment(offset, segment, size, usage)
    }

    /// Adds a segment's base to an offset, after a check of its limit where it has one.
    pub(super) fn add_segment(&mut self, offset: Reg, segment: u8, size: u32, usage: Use) -> Reg {
        if self.mode.is_64() {
            if segment < 4 {
                return offset;
            }
            self.asm.load(Width::B64, SCRATCH, base_slot(segment));
            self.asm
                .lea(Width::B64, T0, Mem::indexed(offset, SCRATCH, 0, 0));
            return T0;
        }
        // Where the limit is not the first thing that can be wrong.
        let ordered = self.align > 1 || size == 10;
        match self.mode.segment(usize::from(segment)) {
            SegmentClass::Flat => offset,
            SegmentClass::Based if !ordered => {
                self.check_limit(offset, segment, size);
                self.asm.load(Width::B32, SCRATCH, base_slot(segment));
                self.asm
                    .lea(Width::B32, T0, Mem::indexed(offset, SCRATCH, 0, 0));
                T0
            }
            SegmentClass::Based | SegmentClass::Checked => {
                if offset != T0 {
                    self.asm.mov(Width::B32, T0, offset);
                }
                self.checked_segment(segment, size, usage);
                T0
            }
        }
    }

    /// Leaves unless `offset .. offset + size` lies within the limit. Keeps flags.
    fn check_limit(&mut self, offset: Reg, segment: u8, size: u32) {
        // limit - last, by way of its complement; the sign bit says whether it lies beyond.
        self.asm
            .lea(Width::B64, SCRATCH, Mem::base(offset, size as i32 - 1));
        self.asm.not(SCRATCH);
        self.asm.load(Width::B32, T1, limit_slot(segment));
        self.asm
            .lea(Width::B64, SCRATCH, Mem::indexed(SCRATCH, T1, 0, 1));
        self.asm.mov_imm(T1, 63);
        self.asm.shrx(SCRATCH, SCRATCH, T1);
        let ok = self.asm.jrcxz();
        let waits = self.waits;
        let site = self.site(self.rip, Reason::Limit { segment, waits });
        self.exit(site);
        self.asm.bind(ok);
    }

    /// Leaves for the segment check in Rust, which puts the linear address into `T0`.
    fn checked_segment(&mut self, segment: u8, size: u32, usage: Use) {
        let site = self.tables.sites.len() as u32;
        self.exit(site);
        let resume = self.here();
        self.site(
            self.rip,
            Reason::Segment(Access {
                resume,
                size: size as u16,
                usage,
                slot: 0,
                segment,
                align: self.align,
                bounce: false,
                waits: self.waits,
            }),
        );
    }

    /// Makes `[address + T1]` a place where the host may access `size` bytes.
    pub(super) fn access(&mut self, address: Reg, size: u32, usage: Use, segment: u8) -> Mem {
        let bounce = self.mode.has(Mode::BOUNCE);
        let site = self.tables.sites.len() as u32;
        self.site(self.rip, Reason::Stale);
        let slot = self.slots;
        self.slots = (self.slots + 1).min(BOUNCE_SLOTS as u8 - 1);
        if bounce {
            if address != T0 {
                self.asm.mov(Width::B64, T0, address);
            }
            self.must_commit |= usage.writes();
            self.exit(site);
        } else if self.flags_live {
            self.check_keeping_flags(address, size, usage, site);
        } else {
            self.check(address, size, usage, site);
        }
        let resume = self.here();
        self.tables.sites[site as usize].reason = Reason::Access(Access {
            resume,
            size: size as u16,
            usage,
            slot,
            segment,
            align: self.align,
            bounce,
            waits: self.waits,
        });
        Mem::indexed(address, T1, 0, 0)
    }

    fn tlb_slot(&self, index: Reg, field: usize) -> Mem {
        let view = self.mode.view() as usize;
        let offset = core::mem::offset_of!(Frame, tlb) + view * size_of::<InlineTlb>() + field;
        Mem::indexed(Reg::RSP, index, 3, disp(offset))
    }

    /// The tag of the entry of the inline TLB with the index in a register.
    pub(super) fn tags_at(&self, index: Reg, usage: Use) -> Mem {
        let field = if usage.writes() {
            core::mem::offset_of!(InlineTlb, write)
        } else {
            core::mem::offset_of!(InlineTlb, read)
        };
        self.tlb_slot(index, field)
    }

    /// The addend of that entry.
    pub(super) fn addend_at(&self, index: Reg) -> Mem {
        self.tlb_slot(index, core::mem::offset_of!(InlineTlb, addend))
    }

    fn last_page(&mut self, address: Reg, size: u32) {
        if size == 1 {
            self.asm.shrx(SCRATCH, address, Reg::RSP);
        } else {
            self.asm
                .lea(Width::B64, SCRATCH, Mem::base(address, size as i32 - 1));
            self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
        }
    }

    fn check(&mut self, address: Reg, size: u32, usage: Use, site: u32) {
        self.asm.bextr(T1, address, Reg::RSP);
        self.last_page(address, size);
        self.finish_check(address, usage, site);
    }

    /// With the index in `T1` and the last byte's page in `rcx`: leaves unless the tag is that page's;
    /// loads the addend.
    pub(super) fn finish_check(&mut self, address: Reg, usage: Use, site: u32) {
        self.asm
            .add_mem(Width::B64, SCRATCH, self.tags_at(T1, usage));
        let from = self.asm.jcc(Cond::Ne as u8);
        self.cold.push(Cold {
            from,
            address,
            site,
        });
        let addend = self.addend_at(T1);
        self.asm.load(Width::B64, T1, addend);
    }

    fn check_keeping_flags(&mut self, address: Reg, size: u32, usage: Use, site: u32) {
        self.index_keeping_flags(address);
        self.last_page(address, size);
        self.finish_keeping_flags(address, usage, site);
    }

    /// The same without a change of flags.
    pub(super) fn finish_keeping_flags(&mut self, address: Reg, usage: Use, site: u32) {
        // The index stays where there is another register for the tag.
        let tag = if address == T0 { T1 } else { T0 };
        self.asm.load(Width::B64, tag, self.tags_at(T1, usage));
        self.asm
            .lea(Width::B64, SCRATCH, Mem::indexed(SCRATCH, tag, 0, 0));
        let ok = self.asm.jrcxz();
        let from = self.asm.jmp();
        self.cold.push(Cold {
            from,
            address,
            site,
        });
        // Nothing comes along here: a place for what must be near.
        self.close_near();
        self.asm.bind(ok);
        if tag == T1 {
            self.index_keeping_flags(address);
        }
        let addend = self.addend_at(T1);
        self.asm.load(Width::B64, T1, addend);
    }

    pub(super) fn index_keeping_flags(&mut self, address: Reg) {
        self.asm.mov_imm(T1, TLB_MASK);
        self.asm.pext(T1, address, T1);
    }
}
