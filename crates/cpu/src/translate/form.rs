//! What the translator needs to know about each instruction form, worked out once per form from
//! iced's tables.

use iced_x86::{Instruction, InstructionInfoFactory, OpAccess, OpCodeOperandKind, Register};

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
}

impl Form {
    pub(crate) fn fields(&self) -> impl Iterator<Item = &Field> {
        self.fields.iter().flatten()
    }
}

/// The forms met so far.
pub(crate) struct Forms {
    known: Vec<Option<Form>>,
    factory: InstructionInfoFactory,
}

impl Default for Forms {
    fn default() -> Self {
        Self {
            known: Vec::new(),
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
    /// The form of this instruction.
    pub(crate) fn get(&mut self, instruction: &Instruction) -> Form {
        let index = instruction.code() as usize;
        if let Some(Some(form)) = self.known.get(index) {
            return *form;
        }
        let form = self.work_out(instruction);
        if self.known.len() <= index {
            self.known.resize(index + 1, None);
        }
        self.known[index] = Some(form);
        form
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
        form
    }
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
                Forms::default().get(&instruction).memory,
                memory,
                "{code:x?}"
            );
        }
    }
}
