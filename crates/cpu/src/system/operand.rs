//! Operands of system instructions: effective addresses, segment checks (SDM 3A, 6.3 to 6.5), loads
//! and stores.

use addr::Gva;
use iced_x86::{CodeSize, Instruction, OpKind, Register};
use x86::descriptor::attributes;

use super::fault::{general, stack};
use super::modes::Mode;
use super::offer::Vendor;
use super::registers::{Width, merge};
use super::{Abort, Context};
use crate::CpuState;
use crate::state::Segment;

/// What an access wants of its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Read,
    Write,
}

/// The width of an instruction's addresses.
pub(super) fn address_mask(instruction: &Instruction) -> u64 {
    let wide = |register: Register| register.is_gpr64() || register == Register::RIP;
    let dword = |register: Register| register.is_gpr32() || register == Register::EIP;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if wide(base) || wide(index) {
        u64::MAX
    } else if dword(base) || dword(index) {
        0xffff_ffff
    } else if base != Register::None || index != Register::None {
        0xffff
    } else {
        match instruction.memory_displ_size() {
            2 => 0xffff,
            4 if instruction.code_size() != CodeSize::Code64 => 0xffff_ffff,
            _ => u64::MAX,
        }
    }
}

/// The offset that the memory operand names in its segment.
pub(super) fn effective_address(state: &CpuState, instruction: &Instruction) -> u64 {
    if instruction.is_ip_rel_memory_operand() {
        return instruction.ip_rel_memory_address();
    }
    let value = |register: Register| match register {
        Register::None => 0,
        register => state.register(register),
    };
    let index =
        value(instruction.memory_index()).wrapping_mul(u64::from(instruction.memory_index_scale()));
    value(instruction.memory_base())
        .wrapping_add(index)
        .wrapping_add(instruction.memory_displacement64())
        & address_mask(instruction)
}

/// The fault of an access through a segment: `#SS(0)` through SS, else `#GP(0)`.
fn segment_fault(segment: Register) -> Abort {
    if segment == Register::SS {
        stack()
    } else {
        general()
    }
}

/// Whether `len` bytes at `offset` lie within the limit (SDM 3A, 6.3).
pub(super) fn within_limit(segment: &Segment, offset: u64, len: u64) -> bool {
    let expands_down = segment.attributes
        & (attributes::S | attributes::CODE | attributes::DOWN_CONFORMING)
        == attributes::S | attributes::DOWN_CONFORMING;
    let last = offset + (len - 1);
    if expands_down {
        let top = if segment.attributes & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    }
}

fn allows(segment: &Segment, want: Want) -> bool {
    let kind = segment.attributes;
    match want {
        Want::Read => kind & attributes::CODE == 0 || kind & attributes::WRITABLE_READABLE != 0,
        Want::Write => kind & attributes::CODE == 0 && kind & attributes::WRITABLE_READABLE != 0,
    }
}

/// The linear address of `len` bytes at `offset` in a segment, checked.
pub(super) fn linear(
    state: &CpuState,
    register: Register,
    offset: u64,
    len: u64,
    want: Want,
) -> Result<Gva, Abort> {
    let segment = state.segments.get(register);
    let mode = state.mode();
    if mode == Mode::Long {
        let base = match register {
            Register::FS | Register::GS => segment.base,
            _ => 0,
        };
        let first = base.wrapping_add(offset);
        let last = first.wrapping_add(len - 1);
        if !state.is_canonical(first) || !state.is_canonical(last) {
            return Err(segment_fault(register));
        }
        return Ok(Gva::new(first));
    }
    let protected = !matches!(mode, Mode::Real | Mode::Virtual8086);
    if protected && (segment.unusable || !allows(segment, want)) {
        return Err(segment_fault(register));
    }
    if !within_limit(segment, offset, len) {
        return Err(segment_fault(register));
    }
    Ok(Gva::new(segment.base.wrapping_add(offset) & 0xffff_ffff))
}

impl Context<'_> {
    /// The linear address of the instruction's memory operand, `len` bytes from `skip` on.
    pub(super) fn operand_address(
        &self,
        instruction: &Instruction,
        skip: u64,
        len: u64,
        want: Want,
    ) -> Result<Gva, Abort> {
        let offset = effective_address(self.state, instruction).wrapping_add(skip)
            & address_mask(instruction);
        let segment = self.segment_of(instruction);
        let beyond = matches!(segment, Register::FS | Register::GS)
            && self.offer.vendor == Vendor::Amd
            && self.state.is_64bit()
            && !self.state.is_canonical(offset);
        if beyond {
            // AMD's CPUs look at the offset, too, before they add a base to it.
            return Err(general());
        }
        linear(self.state, segment, offset, len, want)
    }

    /// The segment of the memory operand. In 64-bit mode only FS and GS can be named; through which
    /// other one it goes says the base register.
    pub(super) fn segment_of(&self, instruction: &Instruction) -> Register {
        let named = instruction.memory_segment();
        if !self.state.is_64bit() || matches!(named, Register::FS | Register::GS) {
            return named;
        }
        match instruction.memory_base().full_register() {
            Register::RSP | Register::RBP => Register::SS,
            _ => Register::DS,
        }
    }

    /// Whether the memory operand's linear address is a multiple of `alignment`.
    pub(super) fn is_aligned(&self, instruction: &Instruction, alignment: u64) -> bool {
        let segment = self.segment_of(instruction);
        let base = match segment {
            Register::FS | Register::GS => self.state.segments.get(segment).base,
            _ if self.state.is_64bit() => 0,
            _ => self.state.segments.get(segment).base,
        };
        base.wrapping_add(effective_address(self.state, instruction)) % alignment == 0
    }

    /// Reads up to eight bytes with the rights of explicit accesses.
    pub(super) fn load(&mut self, gva: Gva, len: u64) -> Result<u64, Abort> {
        let mut bytes = [0; 8];
        let privilege = self.state.explicit_privilege();
        self.memory
            .read(gva, &mut bytes[..len as usize], privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes up to eight bytes with the rights of explicit accesses.
    pub(super) fn store(&mut self, gva: Gva, value: u64, len: u64) -> Result<(), Abort> {
        let privilege = self.state.explicit_privilege();
        self.memory
            .write(gva, &value.to_le_bytes()[..len as usize], privilege)
    }

    /// The value of operand `n`, a register or memory of `len` bytes.
    pub(super) fn read_operand(
        &mut self,
        instruction: &Instruction,
        n: u32,
        len: u64,
    ) -> Result<u64, Abort> {
        match instruction.op_kind(n) {
            OpKind::Register => {
                let mask = if len == 8 {
                    u64::MAX
                } else {
                    (1 << (8 * len)) - 1
                };
                Ok(self.state.register(instruction.op_register(n)) & mask)
            }
            OpKind::Memory => {
                let gva = self.operand_address(instruction, 0, len, Want::Read)?;
                self.load(gva, len)
            }
            _ => Ok(instruction.immediate(n)),
        }
    }

    /// Writes operand 0: a register in its own width, or `len` bytes of memory.
    pub(super) fn write_operand(
        &mut self,
        instruction: &Instruction,
        value: u64,
        len: u64,
    ) -> Result<(), Abort> {
        if instruction.op0_kind() == OpKind::Register {
            self.state.set_register(instruction.op0_register(), value);
            return Ok(());
        }
        let gva = self.operand_address(instruction, 0, len, Want::Write)?;
        self.store(gva, value, len)
    }

    /// RIP behind the instruction.
    pub(super) fn next_rip(&self, instruction: &Instruction) -> u64 {
        let mask = self.state.ip_mask();
        let next = self.state.rip.wrapping_add(instruction.len() as u64);
        if mask == u64::MAX {
            next
        } else {
            merge(0, next, mask)
        }
    }
}

/// The operand size of an instruction without operands that show it, by prefixes and CS.
pub(super) fn width_of_stack(instruction: &Instruction) -> Width {
    Width::of_bytes(instruction.stack_pointer_increment().unsigned_abs() as usize)
}
