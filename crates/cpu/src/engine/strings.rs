//! String instructions (SDM 1, 7.3.9): MOVS, STOS, LODS, CMPS, SCAS, with and without a repeat prefix.
//!
//! Elements are moved in runs that lie within one page on each side; moves and fills of such a run are
//! done by the host's own string instructions. Registers are brought up to date after each run, so a
//! fault or an interrupt finds the instruction half done, as the architecture wants it.

use addr::{Address, Gva, Hva, PageSize};
use iced_x86::{CodeSize, Instruction, Mnemonic, Register};
use memory::access;
use mmu::AccessKind;

use super::memory::{Resolved, privilege_of};
use super::segments::{bad_address, checked, is_canonical, segment};
use super::sites::Then;
use super::vcpu::Vcpu;
use crate::state::gpr::{RAX, RCX, RDI, RSI};
use crate::system::Abort;
use crate::translate::Use;
use crate::{Exit, Handled, HostFault, Platform};
use x86::rflags;

/// The repeat prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repeat {
    None,
    /// `REP`, or `REPE` for comparisons.
    While(bool),
}

/// What a string instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Move,
    Store,
    Load,
    Compare,
    Scan,
}

/// A string instruction taken apart.
#[derive(Clone, Copy, Debug)]
struct StringOp {
    kind: Kind,
    size: u64,
    repeat: Repeat,
    /// Which bits of SI, DI and CX count.
    mask: u64,
    /// Segment of the source.
    source: u8,
    down: bool,
}

/// So many bytes are moved before the loop looks for interrupts.
const MOST: u64 = 64 * 1024;

fn kind_of(mnemonic: Mnemonic) -> (Kind, u64) {
    use Mnemonic as M;
    match mnemonic {
        M::Movsb => (Kind::Move, 1),
        M::Movsw => (Kind::Move, 2),
        M::Movsd => (Kind::Move, 4),
        M::Movsq => (Kind::Move, 8),
        M::Stosb => (Kind::Store, 1),
        M::Stosw => (Kind::Store, 2),
        M::Stosd => (Kind::Store, 4),
        M::Stosq => (Kind::Store, 8),
        M::Lodsb => (Kind::Load, 1),
        M::Lodsw => (Kind::Load, 2),
        M::Lodsd => (Kind::Load, 4),
        M::Lodsq => (Kind::Load, 8),
        M::Cmpsb => (Kind::Compare, 1),
        M::Cmpsw => (Kind::Compare, 2),
        M::Cmpsd => (Kind::Compare, 4),
        M::Cmpsq => (Kind::Compare, 8),
        M::Scasb => (Kind::Scan, 1),
        M::Scasw => (Kind::Scan, 2),
        M::Scasd => (Kind::Scan, 4),
        _ => (Kind::Scan, 8),
    }
}

fn address_mask(instruction: &Instruction) -> u64 {
    use iced_x86::OpKind as K;
    let kinds = (0..instruction.op_count()).map(|i| instruction.op_kind(i));
    for kind in kinds {
        match kind {
            K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => return 0xffff,
            K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => return 0xffff_ffff,
            K::MemorySegRSI | K::MemorySegRDI | K::MemoryESRDI => return u64::MAX,
            _ => {}
        }
    }
    u64::MAX
}

fn source_segment(instruction: &Instruction, in_64_bit: bool) -> u8 {
    match instruction.memory_segment() {
        // The prefixes of the first four mean nothing in 64-bit mode.
        Register::ES | Register::CS | Register::SS if in_64_bit => 3,
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

/// A value under a mask, as a register write of 16, 32 or 64 bits leaves it.
fn merged(old: u64, new: u64, mask: u64) -> u64 {
    match mask {
        0xffff => old & !0xffff | new & 0xffff,
        _ => new & mask,
    }
}

impl StringOp {
    fn new(instruction: &Instruction, df: u8) -> Self {
        let (kind, size) = kind_of(instruction.mnemonic());
        let repeat = if instruction.has_repne_prefix() {
            Repeat::While(false)
        } else if instruction.has_rep_prefix() {
            Repeat::While(true)
        } else {
            Repeat::None
        };
        Self {
            kind,
            size,
            repeat,
            mask: address_mask(instruction),
            source: source_segment(instruction, instruction.code_size() == CodeSize::Code64),
            down: df != 0,
        }
    }

    fn reads_source(self) -> bool {
        matches!(self.kind, Kind::Move | Kind::Load | Kind::Compare)
    }

    fn uses_destination(self) -> bool {
        self.kind != Kind::Load
    }

    fn writes(self) -> bool {
        matches!(self.kind, Kind::Move | Kind::Store)
    }
}

impl Vcpu {
    /// Runs a string instruction to its end, or as far as it gets.
    pub(super) fn run_string(
        &mut self,
        instruction: &Instruction,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        let op = StringOp::new(instruction, self.frame().df);
        let mut moved = 0;
        loop {
            let left = match op.repeat {
                Repeat::None => 1,
                Repeat::While(_) => self.frame().state.gpr[RCX] & op.mask,
            };
            if left == 0 {
                break;
            }
            self.memory.mmio.begin();
            let fast = if left > 1 && self.may_chain() {
                self.string_run(op, left)?
            } else {
                0
            };
            if fast == 0 {
                let ended = self.string_element(op, platform)?;
                self.memory.mmio.end();
                self.advance(op, 1);
                if ended || op.repeat == Repeat::None {
                    break;
                }
            } else {
                self.advance(op, fast);
            }
            moved += fast.max(1) * op.size;
            let waits = self.memory.mmio.has_writes() || !self.memory.late.is_empty();
            if moved >= MOST || waits || self.kick.is_asked() || !self.may_chain() {
                if self.frame().state.gpr[RCX] & op.mask == 0 {
                    break;
                }
                if !self.may_chain() {
                    // A single step ends after each element.
                    return Ok(Then::Done);
                }
                self.boundary_due = true;
                return Ok(Then::Retry);
            }
        }
        self.frame_mut().state.rip = instruction.next_ip();
        Ok(Then::Done)
    }

    fn advance(&mut self, op: StringOp, count: u64) {
        let bytes = count.wrapping_mul(op.size);
        let delta = if op.down { bytes.wrapping_neg() } else { bytes };
        let gpr = &mut self.frame_mut().state.gpr;
        if op.reads_source() {
            gpr[RSI] = merged(gpr[RSI], gpr[RSI].wrapping_add(delta), op.mask);
        }
        if op.uses_destination() {
            gpr[RDI] = merged(gpr[RDI], gpr[RDI].wrapping_add(delta), op.mask);
        }
        if op.repeat != Repeat::None {
            gpr[RCX] = merged(gpr[RCX], gpr[RCX].wrapping_sub(count), op.mask);
        }
    }

    fn string_address(&self, number: u8, offset: u64, size: u64, usage: Use) -> Result<Gva, Abort> {
        let state = self.state();
        if !self.context.mode.is_64() {
            return checked(state, number, offset as u32, size as u32, usage);
        }
        let base = if number < 4 {
            0
        } else {
            segment(state, number).base
        };
        let linear = base.wrapping_add(offset);
        let legal =
            is_canonical(linear, state) && is_canonical(linear.wrapping_add(size - 1), state);
        if legal && !self.is_offset_beyond(Gva::new(linear), number) {
            Ok(Gva::new(linear))
        } else {
            Err(bad_address(if number == 2 { 2 } else { 0 }))
        }
    }

    fn source(&self, op: StringOp) -> Result<Gva, Abort> {
        let offset = self.state().gpr[RSI] & op.mask;
        self.string_address(op.source, offset, op.size, Use::Read)
    }

    fn destination(&self, op: StringOp) -> Result<Gva, Abort> {
        let offset = self.state().gpr[RDI] & op.mask;
        let usage = if op.writes() {
            Use::WriteOnly
        } else {
            Use::Read
        };
        self.string_address(0, offset, op.size, usage)
    }

    /// How many elements from this register on stay in the page, upwards, without wrapping.
    fn run_length(op: StringOp, gva: Gva, register: u64) -> u64 {
        let in_page = (4096 - gva.page_offset(PageSize::Size4K)) / op.size;
        let to_wrap = (op.mask - (register & op.mask)) / op.size;
        in_page.min(to_wrap)
    }

    /// Moves or fills as many elements as lie in one page on each side; 0 where that isn't simple.
    fn string_run(&mut self, op: StringOp, left: u64) -> Result<u64, Abort> {
        if op.down || !matches!(op.kind, Kind::Move | Kind::Store) {
            return Ok(0);
        }
        let destination = match self.destination(op) {
            Err(abort) if op.kind == Kind::Move => {
                // A fault of the source comes before.
                let source = self.source(op)?;
                self.host_run(source, op.size, AccessKind::Read)?;
                return Err(abort);
            }
            destination => destination?,
        };
        let mut count = left.min(Self::run_length(op, destination, self.state().gpr[RDI]));
        let mut source = None;
        if op.kind == Kind::Move {
            let gva = self.source(op)?;
            count = count.min(Self::run_length(op, gva, self.state().gpr[RSI]));
            source = Some(gva);
        }
        if !self.context.mode.is_64() {
            count = count.min(self.within_limits(op));
        }
        if count == 0 {
            return Ok(0);
        }
        let bytes = count * op.size;
        let from = match source {
            None => None,
            Some(gva) => match self.host_run(gva, bytes, AccessKind::Read)? {
                None => return Ok(0),
                from => from,
            },
        };
        let Some(to) = self.host_run(destination, bytes, AccessKind::Write)? else {
            return Ok(0);
        };
        let result = if let Some(from) = from {
            copy_elements(to, from, bytes, op.size)
        } else {
            fill_elements(to, self.state().gpr[RAX], count, op.size)
        };
        result.map_err(|fault| {
            Abort::HostFault(HostFault {
                gpa: None,
                hva: fault.hva,
            })
        })?;
        Ok(count)
    }

    /// Elements before a segment's limit, on either side.
    fn within_limits(&self, op: StringOp) -> u64 {
        let state = self.state();
        let room = |number: u8, offset: u64| {
            let limit = u64::from(segment(state, number).limit) + 1;
            limit.saturating_sub(offset & op.mask) / op.size
        };
        let mut count = room(0, state.gpr[RDI]);
        if op.reads_source() {
            count = count.min(room(op.source, state.gpr[RSI]));
        }
        count
    }

    /// Where a run of bytes within one page lies in the host, if it may be touched directly.
    fn host_run(&mut self, gva: Gva, bytes: u64, kind: AccessKind) -> Result<Option<Hva>, Abort> {
        let view = self.context.mode.view();
        let resolved = self.view().resolve(gva, bytes as usize, kind, view)?;
        Ok(match resolved {
            Resolved::Addend(addend) => Some(Hva::new(gva.raw().wrapping_add(addend))),
            Resolved::Bounce => None,
        })
    }

    /// One element; whether a comparison ends the repetition.
    fn string_element(&mut self, op: StringOp, platform: &mut dyn Platform) -> Result<bool, Abort> {
        let size = op.size as usize;
        // Where both fault, the destination is the one that is reported, but by AMD's CPUs for
        // `REPE CMPSB`.
        let mut early = None;
        if op.kind == Kind::Compare && op.size == 1 && op.repeat == Repeat::While(true) {
            let gva = self.source(op)?;
            early = Some(self.read_element(gva, size, platform)?);
        }
        let other = if matches!(op.kind, Kind::Compare | Kind::Scan) {
            let gva = self.destination(op)?;
            self.read_element(gva, size, platform)?
        } else {
            0
        };
        let value = if let Some(value) = early {
            value
        } else if op.reads_source() {
            let gva = self.source(op)?;
            self.read_element(gva, size, platform)?
        } else {
            self.state().gpr[RAX] & low_bits(op.size)
        };
        match op.kind {
            Kind::Move | Kind::Store => {
                let gva = self.destination(op)?;
                self.write_element(gva, &value.to_le_bytes()[..size])?;
                Ok(false)
            }
            Kind::Load => {
                let rax = &mut self.frame_mut().state.gpr[RAX];
                *rax = match op.size {
                    4 | 8 => value,
                    _ => *rax & !low_bits(op.size) | value,
                };
                Ok(false)
            }
            Kind::Compare | Kind::Scan => {
                let equal = self.compare(value, other, op.size);
                Ok(match op.repeat {
                    Repeat::None => true,
                    Repeat::While(wanted) => equal != wanted,
                })
            }
        }
    }

    pub(super) fn read_element(
        &mut self,
        gva: Gva,
        size: usize,
        platform: &mut dyn Platform,
    ) -> Result<u64, Abort> {
        let privilege = privilege_of(self.context.mode.view());
        let mut bytes = [0; 8];
        let taken = self.memory.mmio.taken();
        loop {
            match self.memory.read_as(gva, &mut bytes[..size], privilege) {
                Err(Abort::Exit(Exit::Mmio(_)))
                    if self.memory.mmio.ask(platform) == Handled::Yes =>
                {
                    self.memory.mmio.take_again(taken);
                }
                result => {
                    result?;
                    return Ok(u64::from_le_bytes(bytes));
                }
            }
        }
    }

    fn write_element(&mut self, gva: Gva, data: &[u8]) -> Result<(), Abort> {
        let privilege = privilege_of(self.context.mode.view());
        self.memory.write_as(gva, data, privilege)
    }

    /// Sets the flags of `value - other`; whether they are equal.
    fn compare(&mut self, value: u64, other: u64, size: u64) -> bool {
        let flags = rflags::of_difference(value, other, 8 * size as u32);
        self.frame_mut().arith = super::run::arith(flags);
        flags & rflags::ZF != 0
    }
}

fn low_bits(size: u64) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// Moves elements upwards. Where the target lies less than a vector behind the source, what the host's
/// byte-wise move does is what moves of elements do only if the distance is no less than an element.
fn copy_elements(to: Hva, from: Hva, bytes: u64, size: u64) -> Result<(), access::HostFault> {
    let distance = to.raw().wrapping_sub(from.raw());
    if distance == 0 || distance >= size {
        return access::copy(to, from, bytes);
    }
    for at in (0..bytes).step_by(size as usize) {
        let value = access::load(from.wrapping_add(at), size as usize)?;
        access::store(to.wrapping_add(at), value, size as usize)?;
    }
    Ok(())
}

fn fill_elements(to: Hva, value: u64, count: u64, size: u64) -> Result<(), access::HostFault> {
    let bytes = value.to_le_bytes();
    let uniform = bytes[..size as usize].iter().all(|b| *b == bytes[0]);
    if uniform {
        return access::fill(to, bytes[0], count * size);
    }
    for at in 0..count {
        access::store(to.wrapping_add(at * size), value, size as usize)?;
    }
    Ok(())
}
