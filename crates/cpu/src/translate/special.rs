//! Instructions that need a sequence of their own, and those that are not offered.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::LONGEST;
use super::address::segment_of;
use super::form::{Form, Traits};
use super::generic::has_memory;
use super::registers::{number, tmp};
use super::{Block, Flow, Mode, SCRATCH, T0, T1, Use};
use crate::emit::asm::Width;
use crate::emit::{Mem, Operands, Reg, Rm};
use crate::engine::frame::{Frame, disp};

/// Which registers an instruction needs the operating system to have enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Integer,
    Wait,
    X87,
    Mmx,
    Sse,
    Avx,
}

fn unit(instruction: &Instruction) -> Unit {
    let registers = |test: fn(Register) -> bool| {
        (0..instruction.op_count()).any(|i| test(instruction.op_register(i)))
    };
    let vector = registers(|r| r.is_xmm() || r.is_ymm());
    let vex = instruction.code().encoding() == EncodingKind::VEX;
    match instruction.mnemonic() {
        Mnemonic::Wait => return Unit::Wait,
        Mnemonic::Vzeroall | Mnemonic::Vzeroupper | Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr => {
            return Unit::Avx;
        }
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => return Unit::Sse,
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
            return Unit::X87;
        }
        Mnemonic::Emms => return Unit::Mmx,
        _ => {}
    }
    if vector {
        return if vex { Unit::Avx } else { Unit::Sse };
    }
    if registers(Register::is_mm) {
        return Unit::Mmx;
    }
    let x87 = |f: &CpuidFeature| {
        matches!(
            f,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
        )
    };
    if instruction.code().cpuid_features().iter().any(x87) || registers(Register::is_st) {
        return Unit::X87;
    }
    Unit::Integer
}

/// The modes in which some unit is missing.
const UNITS: u32 =
    Mode::X87_NM | Mode::SSE_UD | Mode::AVX_UD | Mode::EM | Mode::WAIT_NM | Mode::SSE_NM;

/// Whether the engine runs this instruction in Rust.
pub(super) fn is_rust(instruction: &Instruction, mode: Mode) -> bool {
    if instruction.is_string_instruction() {
        return !crate::system::is_system(instruction)
            && !super::strings::is_inline(instruction, mode);
    }
    runs_in_rust(instruction)
}

/// The same for all but string instructions, in every mode.
pub(super) fn runs_in_rust(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Pusha
            | M::Pushad
            | M::Popa
            | M::Popad
            | M::Enter
            | M::Salc
            | M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
    )
}

/// Whether [`Block::special`] may have a translation for it that isn't a transfer of control, nor
/// for strings.
pub(super) fn has_own_translation(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Lea
            | M::Push
            | M::Pop
            | M::Leave
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Xlatb
            | M::Cld
            | M::Std
    ) || is_moffs(instruction)
}

pub(super) fn is_offered(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let encoding = instruction.code().encoding();
    matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX)
        && !matches!(
            instruction.mnemonic(),
            M::INVALID
                | M::Xbegin
                | M::Xend
                | M::Xabort
                | M::Xtest
                | M::Clzero
                | M::Movdir64b
                | M::Enqcmd
                | M::Enqcmds
                | M::Umonitor
                | M::Rdpru
        )
}

impl Block<'_> {
    /// What happens instead where the instruction is not offered, or its unit is switched off.
    pub(super) fn unavailable(&mut self, instruction: &Instruction, form: &Form) -> Option<Flow> {
        if !form.traits.contains(Traits::OFFERED) {
            let too_long = instruction.is_invalid() && instruction.len() >= LONGEST;
            return Some(if too_long {
                self.raise_general()
            } else {
                self.raise(x86::vector::UD)
            });
        }
        if !self.mode.has(UNITS) {
            return None;
        }
        let (undefined, missing) = match unit(instruction) {
            Unit::Integer => (0, 0),
            Unit::Wait => (0, Mode::WAIT_NM),
            Unit::X87 => (0, Mode::X87_NM | Mode::EM),
            Unit::Mmx => (Mode::EM, Mode::X87_NM),
            Unit::Sse => (Mode::EM | Mode::SSE_UD, Mode::SSE_NM),
            Unit::Avx => (Mode::AVX_UD, Mode::SSE_NM),
        };
        if self.mode.has(undefined) {
            Some(self.raise(x86::vector::UD))
        } else if self.mode.has(missing) {
            Some(self.raise(x86::vector::NM))
        } else {
            None
        }
    }

    /// Translates an instruction that has a sequence of its own; `None` if it has none.
    pub(super) fn special(
        &mut self,
        instruction: &Instruction,
        form: &Form,
        bytes: &[u8],
    ) -> Option<Flow> {
        use Mnemonic as M;
        if !form.traits.contains(Traits::SPECIAL) {
            return None;
        }
        if is_rust(instruction, self.mode) {
            return Some(self.rust(instruction));
        }
        if super::strings::is_inline(instruction, self.mode) {
            return Some(self.string(instruction));
        }
        if let Some(flow) = self.branch(instruction) {
            return Some(flow);
        }
        match instruction.mnemonic() {
            M::Lea => self.lea(instruction),
            M::Push => return Some(self.push(instruction)),
            M::Pop => return Some(self.pop(instruction)),
            M::Leave => return Some(self.leave_frame(instruction)),
            M::Bt | M::Bts | M::Btr | M::Btc => {
                if !has_memory(instruction) || instruction.op1_kind() != OpKind::Register {
                    return None;
                }
                self.bit_string(instruction, bytes);
            }
            M::Xlatb => self.table_lookup(instruction),
            M::Cld => self.direction(0),
            M::Std => self.direction(1),
            M::Mov if is_moffs(instruction) => self.moffs(instruction),
            _ => return None,
        }
        Some(Flow::Next)
    }

    fn direction(&mut self, value: i32) {
        let m = Mem::base(Reg::RSP, disp(core::mem::offset_of!(Frame, df)));
        self.asm.store_imm(Width::B8, m, value);
    }

    /// `BT` and its kin with a bit offset in a register: the offset moves the address, too.
    fn bit_string(&mut self, instruction: &Instruction, bytes: &[u8]) {
        let size = instruction.op1_register().size() as u32;
        let guest = number(instruction.op1_register());
        let scale = size.trailing_zeros() as u8;
        let offset = self.offset(instruction);
        if offset != T0 {
            self.asm.mov(Width::B64, T0, offset);
        }
        let bits = self.value_in(guest, SCRATCH);
        match size {
            2 => self
                .asm
                .op_reg(Width::B64, crate::emit::asm::Map::Of, 0xbf, T1.0, bits),
            4 => self
                .asm
                .op_reg(Width::B64, crate::emit::asm::Map::One, 0x63, T1.0, bits),
            _ => self.asm.mov(Width::B64, T1, bits),
        }
        // The offset within the element, for later; and the element's index.
        let keep = 61 - scale;
        self.asm.mov_imm(SCRATCH, u64::from(keep));
        self.asm.shlx(SCRATCH, T1, SCRATCH);
        self.asm.store(Width::B64, tmp(1), SCRATCH);
        self.asm.mov_imm(SCRATCH, u64::from(3 + scale));
        self.asm.sarx(T1, T1, SCRATCH);
        let m = Mem::indexed(T0, T1, scale, 0);
        match super::address::address_bits(instruction, self.mode) {
            64 => self.asm.lea(Width::B64, T0, m),
            32 => self.asm.lea(Width::B32, T0, m),
            _ => {
                self.asm.lea(Width::B32, T0, m);
                self.asm.movzx(Width::B16, T0, T0);
            }
        }
        self.asm.load(Width::B64, T1, tmp(1));
        self.asm.mov_imm(SCRATCH, u64::from(keep));
        self.asm.shrx(SCRATCH, T1, SCRATCH);
        self.asm.store(Width::B64, tmp(1), SCRATCH);
        let usage = if instruction.mnemonic() == Mnemonic::Bt {
            Use::Read
        } else {
            Use::Write
        };
        let segment = segment_of(instruction, self.mode);
        let address = self.add_segment(T0, segment, size, usage);
        let place = self.access(address, size, usage, segment);
        self.asm.load(Width::B64, SCRATCH, tmp(1));
        let raw = self.parse(instruction, bytes);
        let operands = Operands {
            reg: Some(SCRATCH.0),
            rm: Some(Rm::Mem(place)),
            ..Operands::default()
        };
        raw.emit(self.asm, operands);
    }

    /// `XLATB`: AL from a table at BX + AL.
    fn table_lookup(&mut self, instruction: &Instruction) {
        let segment = segment_of(instruction, self.mode);
        self.asm.movzx(Width::B8, T0, Reg::RAX);
        let m = Mem::indexed(Reg::RBX, T0, 0, 0);
        match instruction.op0_kind() {
            OpKind::MemorySegRDI => self.asm.lea(Width::B64, T0, m),
            _ => match instruction.memory_base() {
                Register::RBX => self.asm.lea(Width::B64, T0, m),
                Register::EBX => self.asm.lea(Width::B32, T0, m),
                _ => {
                    self.asm.lea(Width::B32, T0, m);
                    self.asm.movzx(Width::B16, T0, T0);
                }
            },
        }
        let address = self.add_segment(T0, segment, 1, Use::Read);
        let place = self.access(address, 1, Use::Read, segment);
        self.asm.load(Width::B8, Reg::RAX, place);
    }

    /// `MOV` between the accumulator and a constant address.
    fn moffs(&mut self, instruction: &Instruction) {
        let stores = instruction.op0_kind() == OpKind::Memory;
        let size = instruction.memory_size().size() as u32;
        let width = Width::of_bytes(size);
        let usage = if stores { Use::WriteOnly } else { Use::Read };
        let segment = segment_of(instruction, self.mode);
        let address = self.linear(instruction, size, usage);
        let place = self.access(address, size, usage, segment);
        if stores {
            self.asm.store(width, place, Reg::RAX);
        } else {
            self.asm.load(width, Reg::RAX, place);
        }
    }
}

fn is_moffs(instruction: &Instruction) -> bool {
    use iced_x86::Code as C;
    matches!(
        instruction.code(),
        C::Mov_AL_moffs8
            | C::Mov_AX_moffs16
            | C::Mov_EAX_moffs32
            | C::Mov_RAX_moffs64
            | C::Mov_moffs8_AL
            | C::Mov_moffs16_AX
            | C::Mov_moffs32_EAX
            | C::Mov_moffs64_RAX
    )
}
