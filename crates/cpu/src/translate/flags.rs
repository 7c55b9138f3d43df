//! Which arithmetic flags matter where.
//!
//! The guest's flags live in the host's. A TLB check that may destroy them is shorter than one that
//! keeps them, so for each instruction it is worked out whether any flag that it finds is read before
//! it is written again in the same block. At a block's end all flags count as read.
//!
//! An instruction that can fault shows the guest the flags as they are before it. [`FlagsAtFaults`]
//! says whether that counts.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

use super::form::{FlagUse, Forms, Traits};

/// CF, PF, AF, ZF, SF and OF.
pub(crate) const ARITHMETIC: u32 = RflagsBits::CF
    | RflagsBits::PF
    | RflagsBits::AF
    | RflagsBits::ZF
    | RflagsBits::SF
    | RflagsBits::OF;

/// Whether the guest's fault handlers find the arithmetic flags that the manuals promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FlagsAtFaults {
    /// Always: every memory access keeps them.
    Exact,
    /// Flags that the code replaces before it reads them may be anything in the image that a fault
    /// pushes. Memory accesses are faster.
    #[default]
    IfRead,
}

/// The flags that are surely replaced, whatever they were.
///
/// A flag that the manuals leave undefined may be one that the silicon leaves alone; only for the
/// logical instructions is it known not to be.
fn replaced(instruction: &Instruction) -> u32 {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::And | M::Or | M::Xor | M::Test | M::Add | M::Sub | M::Cmp | M::Adc | M::Sbb | M::Neg => {
            ARITHMETIC
        }
        M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd => 0,
        _ if instruction.has_rep_prefix() || instruction.has_repne_prefix() => 0,
        _ => instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set(),
    }
}

fn of(instruction: &Instruction) -> FlagUse {
    FlagUse {
        read: instruction.rflags_read() & ARITHMETIC,
        replaced: replaced(instruction),
    }
}

/// What an instruction's form says about flags; `None` where immediates or prefixes have a say.
pub(super) fn of_form(instruction: &Instruction) -> Option<FlagUse> {
    use Mnemonic as M;
    let depends = instruction.is_string_instruction()
        || matches!(
            instruction.mnemonic(),
            M::Shl
                | M::Sal
                | M::Shr
                | M::Sar
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shld
                | M::Shrd
        );
    (!depends).then(|| of(instruction))
}

/// Whether flags are live before each instruction, given in order.
pub(crate) fn liveness(
    instructions: &[Instruction],
    forms: &Forms,
    policy: FlagsAtFaults,
    live: &mut Vec<bool>,
) {
    live.clear();
    live.resize(instructions.len(), true);
    masks(instructions, forms, policy, |at, mask| live[at] = mask != 0);
}

/// Which flags are live before each instruction, handed out from the last to the first.
pub(super) fn masks(
    instructions: &[Instruction],
    forms: &Forms,
    policy: FlagsAtFaults,
    mut each: impl FnMut(usize, u32),
) {
    let mut wanted = ARITHMETIC;
    for (at, instruction) in instructions.iter().enumerate().rev() {
        let form = forms.of(instruction);
        let traits = form.traits;
        if traits.contains(Traits::CONDITIONAL) {
            // What runs where it leads is not known.
            wanted = ARITHMETIC;
        }
        if traits.contains(Traits::SYSTEM) && instruction.mnemonic() != Mnemonic::Popfq {
            // Others may look while it is done.
            wanted = ARITHMETIC;
        }
        let FlagUse { read, replaced } = form.flags.unwrap_or_else(|| of(instruction));
        wanted = wanted & !replaced | read;
        if traits.contains(Traits::DIVISION) {
            // The handler of #DE sees them; the division takes long enough.
            wanted = ARITHMETIC;
        }
        if policy == FlagsAtFaults::Exact && may_fault(instruction, traits) {
            wanted = ARITHMETIC;
        }
        each(at, wanted);
    }
}

/// An access may fault; so may a floating-point instruction on registers alone, where the guest has
/// unmasked exceptions.
fn may_fault(instruction: &Instruction, traits: Traits) -> bool {
    traits.contains(Traits::X87)
        || instruction.mnemonic() == Mnemonic::Emms
        || instruction.is_stack_instruction()
        || (0..instruction.op_count()).any(|i| match instruction.op_kind(i) {
            OpKind::Register => {
                let register = instruction.op_register(i);
                register.is_vector_register() || register.is_mm() || register.is_st()
            }
            OpKind::Immediate8
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate32to64
            | OpKind::Immediate64 => false,
            _ => true,
        })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn live_before_first(code: &[u8], policy: FlagsAtFaults) -> bool {
        let decoder = Decoder::new(64, code, DecoderOptions::NONE);
        let instructions: Vec<_> = decoder.into_iter().collect();
        let mut forms = Forms::default();
        for instruction in &instructions {
            forms.learn(instruction);
        }
        let mut live = Vec::new();
        liveness(&instructions, &forms, policy, &mut live);
        live[0]
    }

    #[test]
    fn exact_keeps_flags_for_whoever_may_fault() {
        use FlagsAtFaults::{Exact, IfRead};
        // Each in front of `and %esi,%edi`, which replaces all flags.
        let divsd = [0xf2, 0x0f, 0x5e, 0xd3, 0x23, 0xfe];
        let fadd = [0xd8, 0xc1, 0x23, 0xfe];
        let emms = [0x0f, 0x77, 0x23, 0xfe];
        let load = [0x8b, 0x07, 0x23, 0xfe];
        for code in [&divsd[..], &fadd, &emms, &load] {
            assert!(live_before_first(code, Exact), "{code:x?}");
            assert!(!live_before_first(code, IfRead), "{code:x?}");
        }
        let move_only = [0x89, 0xc3, 0x23, 0xfe];
        assert!(!live_before_first(&move_only, Exact));
    }
}
