//! From a form to an instruction: registers, memory operands and immediates drawn at random.

use fastrand::Rng;
use iced_x86::{
    Decoder, DecoderOptions, Encoder, Instruction, MemoryOperand, OpCodeOperandKind as K, OpKind,
    Register,
};

use super::catalogue::Form;
use super::immediate;
use crate::case::Mode;
use crate::layout::{CODE, CODE_BYTES, WINDOWS, WRITABLE_BYTES};

/// How often operands are drawn before a form is given up: some draws have no encoding
/// (`AH` beside `R8`).
const ATTEMPTS: usize = 40;

/// An instruction and its bytes.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// As the decoder reads the bytes.
    pub instruction: Instruction,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What the operands are drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// General registers that may be used, one bit each in the encoding's order.
    pub gprs: u16,
    /// A register that most memory operands use as their base, with a small displacement.
    pub base: Option<Register>,
}

impl Choice {
    /// Everything.
    pub const ALL: Self = Self {
        gprs: 0xffff,
        base: None,
    };
}

/// Draws an instruction of this form, to stand at `ip`.
pub fn build(form: Form, ip: u64, choice: Choice, rng: &mut Rng) -> Option<Encoded> {
    (0..ATTEMPTS).find_map(|_| {
        let instruction = draw(form, ip, choice, rng)?;
        let mut encoder = Encoder::new(form.mode.bitness());
        encoder.encode(&instruction, ip).ok()?;
        let bytes = with_prefixes(form, encoder.take_buffer(), rng);
        let decoded = decode(&bytes, form.mode, ip);
        (decoded.code() == form.code && decoded.len() == bytes.len()).then_some(Encoded {
            instruction: decoded,
            bytes,
        })
    })
}

/// Reads one instruction.
pub fn decode(bytes: &[u8], mode: Mode, ip: u64) -> Instruction {
    Decoder::with_ip(mode.bitness(), bytes, ip, DecoderOptions::NONE).decode()
}

fn draw(form: Form, ip: u64, choice: Choice, rng: &mut Rng) -> Option<Instruction> {
    let mut instruction = Instruction::default();
    instruction.set_code(form.code);
    let mut source = Source {
        mode: form.mode,
        ip,
        choice,
        rng,
        vectors: 0,
    };
    for (index, kind) in form.code.op_code().op_kinds().iter().enumerate() {
        source.operand(&mut instruction, index as u32, *kind)?;
    }
    Some(instruction)
}

/// Prefixes that change nothing, or what the form allows.
fn with_prefixes(form: Form, bytes: Vec<u8>, rng: &mut Rng) -> Vec<u8> {
    let info = form.code.op_code();
    let mut prefix = None;
    if info.can_use_lock_prefix() && rng.u8(..3) == 0 {
        prefix = Some(0xf0);
    } else if info.can_use_rep_prefix() && rng.bool() {
        prefix = Some(0xf3);
    } else if info.can_use_repne_prefix() && rng.bool() {
        prefix = Some(0xf2);
    } else if rng.u8(..24) == 0 {
        const ANY: [u8; 9] = [0x26, 0x2e, 0x36, 0x3e, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
        prefix = Some(ANY[rng.usize(..ANY.len())]);
    }
    prefix.into_iter().chain(bytes).collect()
}

struct Source<'a> {
    mode: Mode,
    ip: u64,
    choice: Choice,
    rng: &'a mut Rng,
    /// Vector registers in use: gathers need three different ones.
    vectors: u32,
}

impl Source<'_> {
    fn operand(&mut self, instruction: &mut Instruction, index: u32, kind: K) -> Option<()> {
        match kind {
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem => self.register_or_memory(instruction, index, kind)?,
            K::mem | K::mem_mib => self.memory(instruction, index),
            K::mem_offs => self.absolute(instruction, index),
            K::mem_vsib32x | K::mem_vsib64x => self.gather(instruction, index, Register::XMM0)?,
            K::mem_vsib32y | K::mem_vsib64y => self.gather(instruction, index, Register::YMM0)?,
            K::br16_1 | K::br16_2 | K::br32_1 | K::br32_4 | K::br64_1 | K::br64_4 => {
                self.branch(instruction, index, kind);
            }
            K::farbr2_2 | K::farbr4_2 => self.far_branch(instruction, index, kind),
            K::seg_rSI | K::es_rDI | K::seg_rDI | K::seg_rBX_al => {
                self.implied_memory(instruction, index, kind);
            }
            _ if immediate::is_immediate(kind) => {
                immediate::set(instruction, index, kind, self.rng);
            }
            _ => self.register(instruction, index, kind)?,
        }
        Some(())
    }

    fn register(&mut self, instruction: &mut Instruction, index: u32, kind: K) -> Option<()> {
        let register = self.draw_register(kind)?;
        instruction.set_op_kind(index, OpKind::Register);
        instruction.set_op_register(index, register);
        Some(())
    }

    fn register_or_memory(
        &mut self,
        instruction: &mut Instruction,
        index: u32,
        kind: K,
    ) -> Option<()> {
        if self.rng.u8(..5) < 2 {
            self.register(instruction, index, kind)
        } else {
            self.memory(instruction, index);
            Some(())
        }
    }

    fn draw_register(&mut self, kind: K) -> Option<Register> {
        let register = match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => return self.byte_register(),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => self.gpr(Register::AX),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                self.gpr(Register::EAX)
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                self.gpr(Register::RAX)
            }
            K::seg_reg => Register::ES + self.rng.u32(..6),
            K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + self.rng.u32(..8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                Register::XMM0 + self.vector()
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                Register::YMM0 + self.vector()
            }
            K::cr_reg => Register::CR0 + [0, 2, 3, 4, 8][self.rng.usize(..5)],
            K::dr_reg => Register::DR0 + self.rng.u32(..8),
            K::st0 => Register::ST0,
            K::sti_opcode => Register::ST0 + self.rng.u32(..8),
            K::es => Register::ES,
            K::cs => Register::CS,
            K::ss => Register::SS,
            K::ds => Register::DS,
            K::fs => Register::FS,
            K::gs => Register::GS,
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            _ => return None,
        };
        Some(register)
    }

    /// One of the registers that may be used, of the size of `first`.
    fn gpr(&mut self, first: Register) -> Register {
        first + self.gpr_number()
    }

    fn gpr_number(&mut self) -> u32 {
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        loop {
            let number = self.rng.u32(..count);
            if self.choice.gprs >> number & 1 != 0 {
                return number;
            }
        }
    }

    /// `AL` to `R15L`, or `AH` to `BH`.
    fn byte_register(&mut self) -> Option<Register> {
        let number = self.gpr_number();
        if self.rng.u8(..4) == 0 && number < 4 {
            return Some(Register::AH + number);
        }
        if self.mode != Mode::Long && number >= 4 {
            return None;
        }
        let first = [Register::AL, Register::SPL, Register::R8L][(number as usize / 4).min(2)];
        Some(first + if number < 8 { number % 4 } else { number - 8 })
    }

    fn vector(&mut self) -> u32 {
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        let number = self.rng.u32(..count);
        self.vectors |= 1 << number;
        number
    }

    fn memory(&mut self, instruction: &mut Instruction, index: u32) {
        let operand = self.memory_operand();
        set_memory(instruction, index, operand);
    }

    fn memory_operand(&mut self) -> MemoryOperand {
        if let Some(base) = self.choice.base
            && self.rng.u8(..4) != 0
        {
            let alignment = if self.rng.u8(..4) == 0 { !0 } else { !31 };
            let displacement = self.rng.i64(-0x300..0x300) & alignment;
            return MemoryOperand::with_base_displ(base, displacement);
        }
        let mut operand = match (self.rng.u8(..16), self.mode) {
            (0, Mode::Long) => self.rip_relative(),
            (1, _) => self.absolute_operand(),
            (3..12, Mode::Compat16) => self.based_16(),
            (2, _) | (_, Mode::Compat32 | Mode::Compat16) => self.based(Register::EAX),
            (_, Mode::Long) => self.based(Register::RAX),
        };
        operand.segment_prefix = self.segment();
        operand
    }

    fn segment(&mut self) -> Register {
        match self.rng.u8(..24) {
            0 => Register::FS,
            1 => Register::GS,
            2 => [Register::ES, Register::SS, Register::DS][self.rng.usize(..3)],
            _ => Register::None,
        }
    }

    fn rip_relative(&mut self) -> MemoryOperand {
        let target = WINDOWS[0].raw() + self.rng.u64(..WRITABLE_BYTES as u64);
        MemoryOperand::with_base_displ(Register::RIP, target as i64)
    }

    fn absolute_operand(&mut self) -> MemoryOperand {
        let target = WINDOWS[0].raw() + self.rng.u64(..WRITABLE_BYTES as u64);
        let size = match self.mode {
            Mode::Long => 8,
            Mode::Compat16 if self.rng.u8(..4) != 0 => 2,
            Mode::Compat32 | Mode::Compat16 => 4,
        };
        MemoryOperand::with_displ(target - self.mode.data_base(), size)
    }

    /// With 16-bit addresses (SDM 2A, table 2-1).
    fn based_16(&mut self) -> MemoryOperand {
        const BASES: [Register; 3] = [Register::None, Register::BX, Register::BP];
        const INDICES: [Register; 3] = [Register::None, Register::SI, Register::DI];
        let pair = self.rng.usize(1..9);
        let (base, index) = (BASES[pair % 3], INDICES[pair / 3]);
        let (base, index) = if base == Register::None {
            (index, Register::None)
        } else {
            (base, index)
        };
        let (displacement, size) = match self.rng.u8(..3) {
            0 => (0, 0),
            1 => (i64::from(self.rng.i8(..)), 1),
            _ => (i64::from(self.rng.u16(..)), 2),
        };
        let none = Register::None;
        MemoryOperand::new(base, index, 1, displacement, size, false, none)
    }

    fn based(&mut self, first: Register) -> MemoryOperand {
        let base = self.gpr(first);
        let index = self.gpr(first);
        let displacement = match self.rng.u8(..6) {
            0..2 => 0,
            2..4 => i64::from(self.rng.i8(..)),
            4 => i64::from(self.rng.i32(-0x3000..0x3000)),
            _ => i64::from(self.rng.i32(..)),
        };
        let size = match displacement {
            0 if self.rng.bool() => 0,
            -0x80..0x80 if self.rng.u8(..4) != 0 => 1,
            _ if first == Register::RAX => 8,
            _ => 4,
        };
        let scale = 1 << self.rng.u32(..4);
        let indexed = self.rng.u8(..3) == 0 && index - first as u32 != Register::RSP - first as u32;
        let (index, scale) = if indexed && index != first + 4 {
            (index, scale)
        } else {
            (Register::None, 1)
        };
        let base = if index != Register::None && size >= 4 && self.rng.u8(..6) == 0 {
            Register::None
        } else {
            base
        };
        MemoryOperand::new(
            base,
            index,
            scale,
            displacement,
            size,
            false,
            Register::None,
        )
    }

    fn gather(&mut self, instruction: &mut Instruction, index: u32, first: Register) -> Option<()> {
        let mut operand = self.based(if self.mode == Mode::Long {
            Register::RAX
        } else {
            Register::EAX
        });
        if operand.base == Register::None {
            return None;
        }
        operand.index = first + self.vector();
        set_memory(instruction, index, operand);
        Some(())
    }

    fn absolute(&mut self, instruction: &mut Instruction, index: u32) {
        let operand = self.absolute_operand();
        set_memory(instruction, index, operand);
        instruction.set_segment_prefix(self.segment());
    }

    /// Mostly into the filler near by, so that the jump is seen and ends the test.
    fn branch(&mut self, instruction: &mut Instruction, index: u32, kind: K) {
        let near = self.ip.wrapping_add_signed(self.rng.i64(-100..100));
        let far = CODE.raw() + self.rng.u64(..CODE_BYTES as u64 + 64) - self.mode.code_base();
        let narrow = matches!(kind, K::br16_1 | K::br32_1 | K::br64_1);
        let target = if narrow || self.rng.bool() { near } else { far };
        match kind {
            K::br64_1 | K::br64_4 => {
                instruction.set_op_kind(index, OpKind::NearBranch64);
                instruction.set_near_branch64(target);
            }
            K::br32_1 | K::br32_4 => {
                instruction.set_op_kind(index, OpKind::NearBranch32);
                instruction.set_near_branch32(target as u32);
            }
            _ => {
                instruction.set_op_kind(index, OpKind::NearBranch16);
                instruction.set_near_branch16(target as u16);
            }
        }
    }

    fn far_branch(&mut self, instruction: &mut Instruction, index: u32, kind: K) {
        let offset = CODE.raw() + self.rng.u64(..CODE_BYTES as u64) - self.mode.code_base();
        if kind == K::farbr2_2 {
            instruction.set_op_kind(index, OpKind::FarBranch16);
            instruction.set_far_branch16(offset as u16);
        } else {
            instruction.set_op_kind(index, OpKind::FarBranch32);
            instruction.set_far_branch32(offset as u32);
        }
        instruction.set_far_branch_selector(super::selector(self.rng));
    }

    fn implied_memory(&mut self, instruction: &mut Instruction, index: u32, kind: K) {
        if self.mode == Mode::Compat16 && self.rng.u8(..4) != 0 {
            self.implied_memory_16(instruction, index, kind);
            return;
        }
        let narrow = self.mode != Mode::Long || self.rng.u8(..8) == 0;
        let op_kind = match (kind, narrow) {
            (K::seg_rSI, false) => OpKind::MemorySegRSI,
            (K::seg_rSI, true) => OpKind::MemorySegESI,
            (K::es_rDI, false) => OpKind::MemoryESRDI,
            (K::es_rDI, true) => OpKind::MemoryESEDI,
            (K::seg_rDI, false) => OpKind::MemorySegRDI,
            (K::seg_rDI, true) => OpKind::MemorySegEDI,
            _ => OpKind::Memory,
        };
        if op_kind == OpKind::Memory {
            let base = if narrow { Register::EBX } else { Register::RBX };
            instruction.set_memory_base(base);
            instruction.set_memory_index(Register::AL);
        }
        instruction.set_op_kind(index, op_kind);
        if kind != K::es_rDI {
            instruction.set_segment_prefix(self.segment());
        }
    }
}

impl Source<'_> {
    fn implied_memory_16(&mut self, instruction: &mut Instruction, index: u32, kind: K) {
        let op_kind = match kind {
            K::seg_rSI => OpKind::MemorySegSI,
            K::es_rDI => OpKind::MemoryESDI,
            K::seg_rDI => OpKind::MemorySegDI,
            _ => {
                instruction.set_memory_base(Register::BX);
                instruction.set_memory_index(Register::AL);
                OpKind::Memory
            }
        };
        instruction.set_op_kind(index, op_kind);
        if kind != K::es_rDI {
            instruction.set_segment_prefix(self.segment());
        }
    }
}

fn set_memory(instruction: &mut Instruction, index: u32, operand: MemoryOperand) {
    instruction.set_op_kind(index, OpKind::Memory);
    instruction.set_memory_base(operand.base);
    instruction.set_memory_index(operand.index);
    instruction.set_memory_index_scale(operand.scale);
    instruction.set_memory_displ_size(operand.displ_size);
    instruction.set_memory_displacement64(operand.displacement as u64);
    instruction.set_segment_prefix(operand.segment_prefix);
}
