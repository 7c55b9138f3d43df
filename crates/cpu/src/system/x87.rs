//! Instructions that show or load the x87 environment or the legacy image (SDM 1, 8.1.10 and 10.5):
//! `FNSTENV`, `FNSAVE`, `FLDENV`, `FRSTOR`, `FXSAVE`, `FXRSTOR`.
//!
//! They run on the image of the registers, because the pointers that the host's own registers hold are
//! those of translated code.

use addr::Gva;
use iced_x86::{Code, Instruction, Mnemonic};
use x86::control::Efer;
use x86::vector;
use x86::xstate::{FCW_INIT, LEGACY_SIZE, MXCSR_OFFSET, XMM_OFFSET};

use super::fault::general;
use super::modes::Mode;
use super::operand::{Want, address_mask, effective_address};
use super::{Abort, Context, Next};
use crate::Exception;
use crate::fpu::{FpuState, Layout, Pointers, mxcsr_mask};

/// Offsets in the legacy region.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const ST: usize = 32;
/// The mask bits of FCW, and the exceptions of FSW.
const EXCEPTIONS: u16 = 0x3f;
/// ES and B of FSW: an unmasked exception waits.
const SUMMARY: u16 = 0x8080;
/// Bytes that `FXSAVE` writes, with as many XMM registers as the mode has.
const LEGACY_END: usize = XMM_OFFSET + 256;
const LEGACY_END_32: usize = XMM_OFFSET + 128;
/// Bytes of the registers behind an environment.
const STACK_BYTES: usize = 80;

/// The layouts of an environment (SDM 1, figures 8-9 to 8-12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Bytes of a field: 2 or 4.
    field: usize,
    addresses: Addresses,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Addresses {
    /// Selector and offset.
    Protected,
    /// Linear, with the opcode in between: real and virtual-8086 mode.
    Real,
}

impl Shape {
    fn bytes(self) -> usize {
        7 * self.field
    }

    fn field(self, env: &[u8], index: usize) -> u32 {
        let mut raw = [0; 4];
        raw[..self.field].copy_from_slice(&env[index * self.field..][..self.field]);
        u32::from_le_bytes(raw)
    }

    fn set_field(self, env: &mut [u8], index: usize, value: u32) {
        env[index * self.field..][..self.field].copy_from_slice(&value.to_le_bytes()[..self.field]);
    }

    fn store_pointers(self, env: &mut [u8], p: Pointers) {
        let (ip, dp) = (p.ip as u32, p.dp as u32);
        let opcode = u32::from(p.opcode & 0x7ff);
        // What is above a 16-bit field of the 32-bit layout reads as ones.
        let ones = 0xffff_0000;
        match self.addresses {
            Addresses::Protected => {
                self.set_field(env, 3, ip);
                self.set_field(env, 4, u32::from(p.cs) | opcode << 16);
                self.set_field(env, 5, dp);
                self.set_field(env, 6, u32::from(p.ds) | ones);
            }
            Addresses::Real => {
                let ip = ip.wrapping_add(u32::from(p.cs) << 4);
                let dp = dp.wrapping_add(u32::from(p.ds) << 4);
                self.set_field(env, 3, ip & 0xffff | ones);
                self.set_field(env, 4, (ip >> 16) << 12 | opcode);
                self.set_field(env, 5, dp & 0xffff | ones);
                self.set_field(env, 6, (dp >> 16) << 12);
            }
        }
    }

    fn load_pointers(self, env: &[u8]) -> Pointers {
        let [ip, cs, dp, ds] = [3, 4, 5, 6].map(|index| self.field(env, index));
        match self.addresses {
            Addresses::Protected => Pointers {
                opcode: (cs >> 16) as u16 & 0x7ff,
                ip: ip.into(),
                cs: cs as u16,
                dp: dp.into(),
                ds: ds as u16,
            },
            Addresses::Real => Pointers {
                opcode: cs as u16 & 0x7ff,
                ip: u64::from(ip & 0xffff | cs >> 12 << 16),
                cs: 0,
                dp: u64::from(dp & 0xffff | ds >> 12 << 16),
                ds: 0,
            },
        }
    }
}

/// The tag word from the image, which has one bit a register (SDM 1, 8.1.7).
fn full_tags(fpu: &FpuState) -> u16 {
    let top = top(fpu);
    let in_use = fpu.word(FTW);
    (0..8).fold(0, |tags, register| {
        let tag = if in_use >> register & 1 == 0 {
            3
        } else {
            tag_of(fpu, (register + 8 - top) % 8)
        };
        tags | tag << (2 * register)
    })
}

/// 0 for a number, 1 for zero, 2 for all else.
fn tag_of(fpu: &FpuState, index: usize) -> u16 {
    let at = ST + 16 * index;
    let exponent = fpu.word(at + 8) & 0x7fff;
    let mut mantissa = [0; 8];
    mantissa.copy_from_slice(&fpu.image()[at..at + 8]);
    let mantissa = u64::from_le_bytes(mantissa);
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, m) if m >> 63 == 0 => 2,
        _ => 0,
    }
}

fn top(fpu: &FpuState) -> usize {
    usize::from(fpu.word(FSW) >> 11 & 7)
}

/// Sets FSW. The registers of the image are in the order of the stack, whose top may move.
fn set_status(fpu: &mut FpuState, status: u16) {
    let before = top(fpu);
    fpu.set_word(FSW, status);
    let registers = &mut fpu.bytes_mut()[ST..XMM_OFFSET];
    let top = usize::from(status >> 11 & 7);
    registers.rotate_left((top + 8 - before) % 8 * 16);
}

fn short_tags(full: u16) -> u16 {
    (0..8).fold(0, |tags, register| {
        tags | u16::from(full >> (2 * register) & 3 != 3) << register
    })
}

/// ES and B follow from the exceptions and their masks.
fn summarise(fpu: &mut FpuState) {
    let status = fpu.word(FSW) & !SUMMARY;
    let waits = status & !fpu.word(FCW) & EXCEPTIONS != 0;
    fpu.set_word(FSW, status | if waits { SUMMARY } else { 0 });
}

impl Context<'_> {
    /// Runs one of the module's instructions.
    pub(super) fn x87_state(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        match instruction.mnemonic() {
            Mnemonic::Fnstenv => self.store_environment(instruction)?,
            Mnemonic::Fnsave => self.store_x87(instruction)?,
            Mnemonic::Fldenv => self.load_environment(instruction)?,
            Mnemonic::Frstor => self.load_x87(instruction)?,
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => self.fxsave(instruction)?,
            _ => self.fxrstor(instruction)?,
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    fn environment_shape(&self, instruction: &Instruction) -> Shape {
        let short = matches!(
            instruction.code(),
            Code::Fnstenv_m14byte
                | Code::Fldenv_m14byte
                | Code::Fnsave_m94byte
                | Code::Frstor_m94byte
        );
        let real = matches!(self.state.mode(), Mode::Real | Mode::Virtual8086);
        Shape {
            field: if short { 2 } else { 4 },
            addresses: if real {
                Addresses::Real
            } else {
                Addresses::Protected
            },
        }
    }

    fn environment(&self, shape: Shape) -> [u8; 28] {
        let mut env = [0xff; 28];
        let words = [self.fpu.word(FCW), self.fpu.word(FSW), full_tags(self.fpu)];
        for (index, word) in words.into_iter().enumerate() {
            shape.set_field(&mut env, index, u32::from(word) | 0xffff_0000);
        }
        shape.store_pointers(&mut env, self.fpu.visible_pointers(self.offer.x87));
        env
    }

    fn take_environment(&mut self, shape: Shape, env: &[u8]) {
        let word = |index| shape.field(env, index) as u16;
        // Bit 6 always reads as one, bits 13 to 15 and 7 as zero.
        self.fpu.set_word(FCW, word(0) & 0x1f3f | 0x40);
        set_status(self.fpu, word(1));
        self.fpu.set_word(FTW, short_tags(word(2)));
        summarise(self.fpu);
        self.fpu.set_pointers(shape.load_pointers(env));
        self.x87_in_use();
    }

    fn x87_in_use(&mut self) {
        let present = self.fpu.xstate_bv() | x86::xstate::X87;
        self.fpu.set_xstate_bv(present);
    }

    fn require_nothing_pending(&self) -> Result<(), Abort> {
        if self.fpu.is_exception_pending() {
            return Err(Exception::plain(vector::MF).into());
        }
        Ok(())
    }

    fn area(&self, instruction: &Instruction, len: usize, want: Want) -> Result<Gva, Abort> {
        self.operand_address(instruction, 0, len as u64, want)
    }

    /// The area of an environment, alone or with the registers behind it. AMD's CPUs try the first
    /// field and the last byte before all else.
    fn environment_area(
        &mut self,
        instruction: &Instruction,
        shape: Shape,
        len: usize,
        want: Want,
    ) -> Result<Gva, Abort> {
        for (skip, len) in [(0, shape.field), (len - 1, 1)] {
            let gva = self.operand_address(instruction, skip as u64, len as u64, want)?;
            self.probe(gva, len, want)?;
        }
        let gva = self.area(instruction, len, want)?;
        self.probe(gva, len, want)?;
        Ok(gva)
    }

    /// Faults as an access of `len` bytes would.
    pub(super) fn probe(&mut self, gva: Gva, len: usize, want: Want) -> Result<(), Abort> {
        let privilege = self.state.explicit_privilege();
        match want {
            Want::Write => self.memory.check_write(gva, len, privilege),
            Want::Read => {
                let mut bytes = [0; LEGACY_SIZE];
                self.memory.read(gva, &mut bytes[..len], privilege)
            }
        }
    }

    fn write_area(&mut self, gva: Gva, bytes: &[u8]) -> Result<(), Abort> {
        if bytes.is_empty() {
            return Ok(());
        }
        let privilege = self.state.explicit_privilege();
        self.memory.write(gva, bytes, privilege)
    }

    fn read_area(&mut self, gva: Gva, bytes: &mut [u8]) -> Result<(), Abort> {
        if bytes.is_empty() {
            return Ok(());
        }
        let privilege = self.state.explicit_privilege();
        self.memory.read(gva, bytes, privilege)
    }

    fn store_environment(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let shape = self.environment_shape(instruction);
        let gva = self.environment_area(instruction, shape, shape.bytes(), Want::Write)?;
        let env = self.environment(shape);
        self.write_area(gva, &env[..shape.bytes()])?;
        let masked = self.fpu.word(FCW) | EXCEPTIONS;
        self.fpu.set_word(FCW, masked);
        summarise(self.fpu);
        Ok(())
    }

    fn store_x87(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let shape = self.environment_shape(instruction);
        let len = shape.bytes() + STACK_BYTES;
        let gva = self.environment_area(instruction, shape, len, Want::Write)?;
        let mut bytes = [0; 28 + STACK_BYTES];
        bytes[..28].copy_from_slice(&self.environment(shape));
        let registers = &mut bytes[shape.bytes()..len];
        for (index, register) in registers.chunks_mut(10).enumerate() {
            register.copy_from_slice(&self.fpu.image()[ST + 16 * index..][..10]);
        }
        self.write_area(gva, &bytes[..len])?;
        // FNINIT leaves the registers' contents, and marks them empty.
        self.fpu.set_word(FCW, FCW_INIT);
        set_status(self.fpu, 0);
        self.fpu.set_word(FTW, 0);
        self.fpu.set_pointers(Pointers::default());
        Ok(())
    }

    fn load_environment(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        self.require_nothing_pending()?;
        let shape = self.environment_shape(instruction);
        let gva = self.environment_area(instruction, shape, shape.bytes(), Want::Read)?;
        let mut env = [0; 28];
        self.read_area(gva, &mut env[..shape.bytes()])?;
        self.take_environment(shape, &env);
        Ok(())
    }

    fn load_x87(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        self.require_nothing_pending()?;
        let shape = self.environment_shape(instruction);
        let len = shape.bytes() + STACK_BYTES;
        let gva = self.environment_area(instruction, shape, len, Want::Read)?;
        let mut bytes = [0; 28 + STACK_BYTES];
        self.read_area(gva, &mut bytes[..len])?;
        self.take_environment(shape, &bytes);
        let registers = &bytes[shape.bytes()..len];
        for (index, register) in registers.chunks(10).enumerate() {
            self.fpu.bytes_mut()[ST + 16 * index..][..10].copy_from_slice(register);
        }
        Ok(())
    }

    /// How much of the legacy region `FXSAVE` and `FXRSTOR` touch (APM 2, 3.1.7, "FFXSR").
    fn legacy_end(&self) -> usize {
        if self.state.mode() != Mode::Long {
            LEGACY_END_32
        } else if self.state.msrs.efer & Efer::FFXSR.bits() != 0 && self.state.cpl() == 0 {
            XMM_OFFSET
        } else {
            LEGACY_END
        }
    }

    fn legacy_layout(instruction: &Instruction) -> Layout {
        if matches!(
            instruction.mnemonic(),
            Mnemonic::Fxsave64 | Mnemonic::Fxrstor64
        ) {
            Layout::Wide
        } else {
            Layout::Narrow
        }
    }

    /// The parts of the legacy region: one, or two where its addresses begin again at 0. AMD's CPUs try
    /// the first field, the alignment and the last byte before all else.
    fn legacy_parts(
        &mut self,
        instruction: &Instruction,
        want: Want,
    ) -> Result<[(Gva, usize); 2], Abort> {
        const FIELD: u64 = 4;
        let first = self.operand_address(instruction, 0, FIELD, want)?;
        if !first.raw().is_multiple_of(16) {
            return Err(general());
        }
        let last = self.operand_address(instruction, LEGACY_SIZE as u64 - 1, 1, want)?;
        self.probe(last, 1, want)?;
        let offset = effective_address(self.state, instruction);
        let to_end = (address_mask(instruction) - offset).saturating_add(1);
        let len = to_end.min(LEGACY_SIZE as u64);
        let mut parts = [(first, len as usize), (first, 0)];
        self.operand_address(instruction, 0, len, want)?;
        let rest = LEGACY_SIZE as u64 - len;
        if rest > 0 {
            let second = self.operand_address(instruction, len, rest, want)?;
            parts[1] = (second, rest as usize);
        }
        for (gva, len) in parts.into_iter().filter(|(_, len)| *len > 0) {
            self.probe(gva, len, want)?;
        }
        Ok(parts)
    }

    fn fxsave(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let parts = self.legacy_parts(instruction, Want::Write)?;
        let mut bytes = [0; LEGACY_END];
        bytes.copy_from_slice(&self.fpu.image()[..LEGACY_END]);
        let layout = Self::legacy_layout(instruction);
        let control = self.fpu.control_to_save(self.offer.x87, layout);
        bytes[..MXCSR_OFFSET].copy_from_slice(&control);
        let end = self.legacy_end();
        let mut rest = &bytes[..end];
        for (gva, len) in parts {
            let (now, later) = rest.split_at(len.min(rest.len()));
            self.write_area(gva, now)?;
            rest = later;
        }
        Ok(())
    }

    fn fxrstor(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let parts = self.legacy_parts(instruction, Want::Read)?;
        let mut bytes = [0; LEGACY_SIZE];
        let (low, high) = bytes.split_at_mut(parts[0].1);
        self.read_area(parts[0].0, low)?;
        self.read_area(parts[1].0, high)?;
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&bytes[MXCSR_OFFSET..MXCSR_OFFSET + 4]);
        if u32::from_le_bytes(mxcsr) & !mxcsr_mask() != 0 {
            return Err(general());
        }
        let end = self.legacy_end();
        // The mask behind MXCSR is not loaded.
        let mask = mxcsr_mask().to_le_bytes();
        bytes[MXCSR_OFFSET + 4..ST].copy_from_slice(&mask);
        self.fpu.bytes_mut()[..end].copy_from_slice(&bytes[..end]);
        self.fpu.loaded_pointers(Self::legacy_layout(instruction));
        let present = self.fpu.xstate_bv() | x86::xstate::X87 | x86::xstate::SSE;
        self.fpu.set_xstate_bv(present);
        Ok(())
    }
}
