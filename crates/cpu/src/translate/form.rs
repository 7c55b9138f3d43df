//! What the translator needs to know about each instruction form, worked out once per form from
//! iced's tables.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind,
    OpCodeTableKind, Register,
};

use super::registers::RegisterFacts;
use super::visible::Conduct;

/// Which field of the encoding holds a register operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Reg,
    Rm,
    Vvvv,
    Opcode,
}

/// A general register operand in a field of the encoding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field {
    pub(crate) place: Place,
    /// Number of the operand.
    pub(crate) operand: u8,
    pub(crate) bytes: u8,
    pub(crate) read: bool,
    pub(crate) written: bool,
}

impl Field {
    /// Whether the old value must be in the register before the instruction runs.
    pub(crate) fn needs_old(self) -> bool {
        self.read || self.bytes < 4
    }
}

/// How an instruction uses its memory operand (or would, where it has a register there).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryUse {
    None,
    /// The address only: `LEA`, prefetches, multi-byte `NOP`.
    Address,
    Read,
    Write,
    WriteOnly,
}

/// One instruction form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    fields: [Option<Field>; 4],
    pub(crate) memory: MemoryUse,
    /// The operand-size prefix chooses the size of integers (rather than another instruction).
    pub(crate) sized: Option<u8>,
    /// CL is an operand.
    pub(crate) uses_cl: bool,
    pub(crate) traits: Traits,
    /// Which operands are written if they are general registers, a bit for each.
    writes: u8,
    /// The alignment that a memory operand must have.
    pub(crate) align: u8,
    /// What it has to do with arithmetic flags.
    pub(crate) conduct: Conduct,
}

bitflags::bitflags! {
    /// What is asked of each instruction several times.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Traits: u16 {
        /// See [`crate::system::is_system`].
        const SYSTEM = 1;
        /// May end a block: it transfers control, is of the system's, or is not offered.
        const MAY_END = 1 << 1;
        /// Has a translation of its own, in some form.
        const SPECIAL = 1 << 2;
        /// Is offered to guests.
        const OFFERED = 1 << 3;
        /// An x87 instruction.
        const X87 = 1 << 4;
        /// Names an MMX register.
        const MMX = 1 << 5;
        /// `PUSH`, `CALL` and the like.
        const STACK = 1 << 6;
        /// See [`super::window::is_plain_integer`].
        const PLAIN_INTEGER = 1 << 7;
        /// See [`super::window::is_plain_vector`].
        const PLAIN_VECTOR = 1 << 8;
        /// The next instruction follows it.
        const NEXT = 1 << 9;
        /// Can fault even without an operand in memory: a floating-point instruction, say, where the
        /// guest has unmasked exceptions.
        const MAY_FAULT = 1 << 10;
        /// Accesses its memory operand, if it has one.
        const ACCESSES = 1 << 11;
    }
}

/// Arithmetic flags, as iced's bits: a bound for all instructions of a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FlagUse {
    pub(crate) read: u8,
    /// Those that are surely replaced.
    pub(crate) replaced: u8,
    /// Those that may be others behind it.
    pub(crate) touched: u8,
}

impl Form {
    pub(crate) fn fields(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().flatten()
    }
}

/// The register operands of an instruction, taken together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    /// Any is AH, CH, DH or BH.
    pub(crate) high: bool,
    /// Any is not at home in the host's register of its name.
    pub(crate) elsewhere: bool,
    /// How many live in the frame.
    pub(crate) in_frame: u8,
    /// Those that are written, by number.
    pub(crate) written: u16,
}

// Two to a cache line: fresh code asks for many.
const _: () = assert!(size_of::<Option<Form>>() == 32);

/// The forms met so far.
///
/// All that is asked of an instruction's form is worked out once: a look-up by its code is what is
/// left to each of a block's instructions.
pub(crate) struct Forms {
    known: Vec<Option<Form>>,
    registers: Vec<RegisterFacts>,
    factory: InstructionInfoFactory,
}

impl Default for Forms {
    fn default() -> Self {
        Self {
            known: vec![None; Code::values().len()],
            registers: Register::values().map(RegisterFacts::of).collect(),
            factory: InstructionInfoFactory::new(),
        }
    }
}

impl std::fmt::Debug for Forms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forms").finish_non_exhaustive()
    }
}

fn field_of(kind: OpCodeOperandKind) -> Option<(Place, u8)> {
    use OpCodeOperandKind as K;
    Some(match kind {
        K::r8_or_mem => (Place::Rm, 1),
        K::r16_or_mem | K::r16_rm => (Place::Rm, 2),
        K::r32_or_mem | K::r32_rm => (Place::Rm, 4),
        K::r64_or_mem | K::r64_rm => (Place::Rm, 8),
        K::r8_reg => (Place::Reg, 1),
        K::r16_reg => (Place::Reg, 2),
        K::r32_reg => (Place::Reg, 4),
        K::r64_reg => (Place::Reg, 8),
        K::r32_vvvv => (Place::Vvvv, 4),
        K::r64_vvvv => (Place::Vvvv, 8),
        K::r8_opcode => (Place::Opcode, 1),
        K::r16_opcode => (Place::Opcode, 2),
        K::r32_opcode => (Place::Opcode, 4),
        K::r64_opcode => (Place::Opcode, 8),
        _ => return None,
    })
}

/// Three registers like this one.
fn alike(register: Register) -> Option<[Register; 3]> {
    use Register as R;
    Some(match register {
        r if r.is_gpr64() => [R::RAX, R::RBX, R::RDX],
        r if r.is_gpr32() => [R::EAX, R::EBX, R::EDX],
        r if r.is_gpr16() => [R::AX, R::BX, R::DX],
        r if r.is_gpr8() => [R::AL, R::BL, R::DL],
        r if r.is_mm() => [R::MM0, R::MM1, R::MM2],
        r if r.is_xmm() => [R::XMM0, R::XMM1, R::XMM2],
        r if r.is_ymm() => [R::YMM0, R::YMM1, R::YMM2],
        _ => return None,
    })
}

/// The same instruction with different registers where several operands name one: iced knows that
/// `xor eax, eax` and `vpxor xmm0, xmm1, xmm1` read nothing, which does not hold for the form.
fn without_idiom(instruction: &Instruction) -> Instruction {
    let mut general = *instruction;
    for operand in 1..general.op_count().min(3) {
        let register = general.op_register(operand);
        let taken: Vec<_> = (0..operand).map(|i| general.op_register(i)).collect();
        if register == Register::None || !taken.contains(&register) {
            continue;
        }
        let other = alike(register)
            .and_then(|all| all.into_iter().find(|candidate| !taken.contains(candidate)));
        if let Some(other) = other {
            general.set_op_register(operand, other);
        }
    }
    general
}

fn is_read(access: OpAccess) -> bool {
    use OpAccess as A;
    // A conditional write keeps the old value where it doesn't happen.
    !matches!(access, A::None | A::Write | A::NoMemAccess)
}

fn is_written(access: OpAccess) -> bool {
    use OpAccess as A;
    matches!(
        access,
        A::Write | A::CondWrite | A::ReadWrite | A::ReadCondWrite
    )
}

impl Forms {
    /// Gets to know the form of this instruction.
    #[inline]
    pub(crate) fn learn(&mut self, instruction: &Instruction) -> &Form {
        let index = instruction.code() as usize;
        if self.known[index].is_none() {
            self.known[index] = Some(self.work_out(instruction));
        }
        self.of(instruction)
    }

    /// The form of an instruction that was decoded, and so [`Self::learn`]ed.
    #[inline]
    pub(crate) fn of(&self, instruction: &Instruction) -> &Form {
        self.known[instruction.code() as usize]
            .as_ref()
            .expect("decoding has learned the form")
    }

    /// The register operands of an instruction of this form. No form has a general register as its
    /// fourth operand.
    #[inline]
    pub(crate) fn named(&self, instruction: &Instruction, form: &Form) -> Named {
        let facts = |register: Register| self.registers[register as usize];
        let first = facts(instruction.op0_register());
        let second = facts(instruction.op1_register());
        let third = facts(instruction.op2_register());
        // All ones where the operand is written: code of all kinds comes by, and no branch would
        // be foretold.
        let writes = |operand: u8| u16::from(form.writes >> operand & 1).wrapping_neg();
        Named {
            high: first.high | second.high | third.high,
            elsewhere: first.elsewhere | second.elsewhere | third.elsewhere,
            in_frame: u8::from(first.in_frame)
                + u8::from(second.in_frame)
                + u8::from(third.in_frame),
            written: first.mask & writes(0) | second.mask & writes(1) | third.mask & writes(2),
        }
    }

    fn work_out(&mut self, instruction: &Instruction) -> Form {
        let general = without_idiom(instruction);
        let info = self.factory.info(&general);
        let op_code = instruction.op_code();
        let mut form = Form {
            fields: [None; 4],
            memory: MemoryUse::None,
            sized: None,
            uses_cl: false,
            traits: Traits::empty(),
            // Also the accumulator of short forms, which is in no field.
            writes: u8::from(!matches!(
                instruction.mnemonic(),
                Mnemonic::Cmp | Mnemonic::Test
            )),
            align: super::generic::memory_alignment(instruction),
            conduct: Conduct::of(instruction, Traits::empty()),
        };
        let mut count = 0;
        for operand in 0..instruction.op_count() {
            let kind = op_code.op_kind(operand);
            let access = info.op_access(operand);
            form.uses_cl |= kind == OpCodeOperandKind::cl;
            if may_be_memory(kind) {
                form.memory = memory_use(access);
            }
            if let Some((place, bytes)) = field_of(kind) {
                form.writes |= u8::from(is_written(access)) << operand;
                form.fields[count] = Some(Field {
                    place,
                    operand: operand as u8,
                    bytes,
                    read: is_read(access),
                    written: is_written(access),
                });
                count += 1;
            }
        }
        form.sized = match op_code.operand_size() {
            0 | 64 => None,
            bits => Some(bits as u8),
        };
        form.traits = traits(instruction, &form);
        form.conduct = Conduct::of(instruction, form.traits);
        form
    }
}

/// An opcode that begins with D8 to DF.
fn is_x87(instruction: &Instruction) -> bool {
    let op_code = instruction.op_code();
    let first = match op_code.op_code_len() {
        2 => op_code.op_code() >> 8,
        _ => op_code.op_code(),
    };
    op_code.table() == OpCodeTableKind::Normal && (0xd8..=0xdf).contains(&first)
}

fn traits(instruction: &Instruction, form: &Form) -> Traits {
    let next = instruction.flow_control() == FlowControl::Next;
    let system = crate::system::is_system(instruction);
    let offered = super::special::is_offered(instruction);
    let rust = instruction.is_string_instruction() || super::special::runs_in_rust(instruction);
    let mmx = instruction.op0_register().is_mm() || instruction.op1_register().is_mm();
    let mut traits = Traits::empty();
    traits.set(Traits::SYSTEM, system);
    traits.set(Traits::MAY_END, !next || system || !offered || rust);
    let own = super::special::has_own_translation(instruction);
    traits.set(Traits::SPECIAL, !next || rust || own);
    traits.set(Traits::OFFERED, offered);
    traits.set(Traits::X87, is_x87(instruction));
    traits.set(Traits::MMX, mmx);
    traits.set(Traits::STACK, instruction.is_stack_instruction());
    let plain_integer = super::window::is_plain_integer(instruction.mnemonic());
    traits.set(Traits::PLAIN_INTEGER, plain_integer);
    let plain = super::window::is_plain_vector(instruction, form);
    traits.set(Traits::PLAIN_VECTOR, plain);
    traits.set(Traits::NEXT, next);
    let vector = (0..instruction.op_count()).any(|i| {
        let register = instruction.op_register(i);
        register.is_vector_register() || register.is_mm()
    });
    // XLAT's operand is in no field.
    let accesses = !matches!(form.memory, MemoryUse::None | MemoryUse::Address)
        || instruction.mnemonic() == Mnemonic::Xlatb;
    traits.set(Traits::ACCESSES, accesses);
    let ends = traits.intersects(Traits::SYSTEM | Traits::MAY_END);
    let others = Traits::X87 | Traits::MMX | Traits::STACK;
    let harmless = plain_integer || is_harmless(instruction.mnemonic());
    traits.set(
        Traits::MAY_FAULT,
        vector || ends || traits.intersects(others) || !harmless,
    );
    traits
}

/// Integer instructions beyond those of [`Traits::PLAIN_INTEGER`] that fault by their operand in memory
/// alone.
fn is_harmless(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Imul
            | M::Mul
            | M::Mulx
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Bswap
            | M::Movbe
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Tzcnt
            | M::Lzcnt
            | M::Popcnt
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Shlx
            | M::Shrx
            | M::Sarx
            | M::Rorx
            | M::Andn
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Lahf
            | M::Sahf
    )
}

fn may_be_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        kind,
        K::mem
            | K::mem_offs
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
    )
}

fn memory_use(access: OpAccess) -> MemoryUse {
    match access {
        OpAccess::None | OpAccess::NoMemAccess => MemoryUse::Address,
        OpAccess::Read | OpAccess::CondRead => MemoryUse::Read,
        OpAccess::Write => MemoryUse::WriteOnly,
        OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => MemoryUse::Write,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    #[test]
    fn an_idiom_says_nothing_of_its_form() {
        let cases: [(&[u8], MemoryUse); 5] = [
            (&[0x31, 0xc0], MemoryUse::Write),            // xor %eax,%eax
            (&[0x33, 0xc0], MemoryUse::Read),             // the other way round
            (&[0x66, 0x0f, 0xef, 0xc0], MemoryUse::Read), // pxor %xmm0,%xmm0
            (&[0xc5, 0xf1, 0xef, 0xc1], MemoryUse::Read), // vpxor %xmm1,%xmm1,%xmm0
            (&[0xc5, 0xf4, 0x57, 0xc1], MemoryUse::Read), // vxorps %ymm1,%ymm1,%ymm0
        ];
        for (code, memory) in cases {
            let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
            assert_eq!(
                Forms::default().learn(&instruction).memory,
                memory,
                "{code:x?}"
            );
        }
    }
}
