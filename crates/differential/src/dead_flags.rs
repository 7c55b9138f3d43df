//! Flags that nobody can see but the handler of a fault.
//!
//! Where an instruction replaces all arithmetic flags, or those behind it do before any reads them,
//! the translator checks addresses in a way that destroys the old ones. When the access then faults,
//! the handler finds other flags than on the physical CPU; they are replaced as soon as the
//! instruction runs again. It is the one thing in which the translator is knowingly not exact, and
//! this module says where, so that everything else is compared.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, RflagsBits};

use crate::case::{Ending, Outcome, Program};
use crate::generate::state::ARITHMETIC_FLAGS;

/// The flags that are not compared in this outcome.
pub fn unseen(program: &Program, outcome: &Outcome) -> u64 {
    let rip = outcome.state.rip;
    let Some(offset) = rip.checked_sub(program.entry()) else {
        return 0;
    };
    let Some(code) = program.code().get(offset as usize..) else {
        return 0;
    };
    if !is_memory_fault(outcome.ending) {
        return 0;
    }
    let options = DecoderOptions::NONE;
    let decoder = Decoder::with_ip(program.mode.bitness(), code, rip, options);
    if all_replaced(decoder) {
        ARITHMETIC_FLAGS
    } else {
        0
    }
}

fn is_memory_fault(ending: Ending) -> bool {
    matches!(ending.vector, 12..=14 | 17)
}

/// Whether every flag is replaced before it is read, in straight code.
fn all_replaced(instructions: impl IntoIterator<Item = Instruction>) -> bool {
    let mut wanted = RflagsBits::CF
        | RflagsBits::PF
        | RflagsBits::AF
        | RflagsBits::ZF
        | RflagsBits::SF
        | RflagsBits::OF;
    for instruction in instructions {
        if instruction.rflags_read() & wanted != 0 {
            return false;
        }
        wanted &= !replaced(&instruction);
        if wanted == 0 {
            return true;
        }
        if instruction.flow_control() != FlowControl::Next {
            return false;
        }
    }
    false
}

/// Flags that the instruction replaces whatever its operands are.
fn replaced(instruction: &Instruction) -> u32 {
    let shifts = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    if shifts || instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        0
    } else {
        instruction.rflags_modified()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_replaced_in(code: &[u8]) -> bool {
        all_replaced(Decoder::new(64, code, DecoderOptions::NONE))
    }

    #[test]
    fn what_the_next_instructions_do_decides() {
        assert!(all_replaced_in(&[0x48, 0x01, 0x07])); // add %rax,(%rdi)
        assert!(!all_replaced_in(&[0x48, 0x11, 0x07])); // adc %rax,(%rdi)
        assert!(!all_replaced_in(&[0x48, 0xff, 0x07])); // incq (%rdi): CF stays
        assert!(!all_replaced_in(&[0x48, 0x8b, 0x07])); // mov (%rdi),%rax
        assert!(all_replaced_in(&[0x48, 0x8b, 0x07, 0x48, 0x39, 0xd8])); // mov, then cmp
        assert!(!all_replaced_in(&[0x8b, 0x07, 0x74, 0x00, 0x39, 0xd8])); // mov, jz, cmp
    }
}
