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
    if !is_fault_of_access(outcome.ending) {
        return 0;
    }
    let options = DecoderOptions::NONE;
    let decoder = Decoder::with_ip(program.mode.bitness(), code, rip, options);
    replaced_unread(decoder)
}

/// Faults of memory operands, and of floating-point instructions that have one.
fn is_fault_of_access(ending: Ending) -> bool {
    matches!(ending.vector, 12..=14 | 16 | 17 | 19)
}

/// The flags that are replaced before they are read, in straight code.
fn replaced_unread(instructions: impl IntoIterator<Item = Instruction>) -> u64 {
    let mut wanted = RflagsBits::CF
        | RflagsBits::PF
        | RflagsBits::AF
        | RflagsBits::ZF
        | RflagsBits::SF
        | RflagsBits::OF;
    let mut seen = 0;
    for instruction in instructions {
        seen |= instruction.rflags_read() & wanted;
        wanted &= !replaced(&instruction);
        if wanted == 0 || instruction.flow_control() != FlowControl::Next {
            break;
        }
    }
    ARITHMETIC_FLAGS & !host_flags(seen | wanted)
}

/// Flags of iced-x86 as bits of RFLAGS.
fn host_flags(flags: u32) -> u64 {
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .into_iter()
    .filter(|(flag, _)| flags & flag != 0)
    .fold(0, |all, (_, bit)| all | 1 << bit)
}

/// Flags that the instruction replaces whatever its operands are.
fn replaced(instruction: &Instruction) -> u32 {
    let shifts = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    // A repeated one may run no round.
    let repeated = instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix());
    if shifts || repeated {
        0
    } else {
        instruction.rflags_modified()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARRY: u64 = 1;

    fn unseen_in(code: &[u8]) -> u64 {
        replaced_unread(Decoder::new(64, code, DecoderOptions::NONE))
    }

    #[test]
    fn what_the_next_instructions_do_decides() {
        assert_eq!(unseen_in(&[0x48, 0x01, 0x07]), ARITHMETIC_FLAGS); // add %rax,(%rdi)
        assert_eq!(unseen_in(&[0x48, 0x11, 0x07]), ARITHMETIC_FLAGS & !CARRY); // adc %rax,(%rdi)
        assert_eq!(unseen_in(&[0x48, 0xff, 0x07]), ARITHMETIC_FLAGS & !CARRY); // incq (%rdi)
        assert_eq!(unseen_in(&[0x48, 0x8b, 0x07]), 0); // mov (%rdi),%rax
        let compared = [0x48, 0x8b, 0x07, 0x48, 0x39, 0xd8]; // mov, then cmp
        assert_eq!(unseen_in(&compared), ARITHMETIC_FLAGS);
        assert_eq!(unseen_in(&[0x8b, 0x07, 0x74, 0x00, 0x39, 0xd8]), 0); // mov, jz, cmp
        assert_eq!(unseen_in(&[0x8b, 0x07, 0xa7]), ARITHMETIC_FLAGS); // mov, cmpsd
        assert_eq!(unseen_in(&[0x8b, 0x07, 0xf3, 0xa7]), 0); // mov, repe cmpsd
    }
}
