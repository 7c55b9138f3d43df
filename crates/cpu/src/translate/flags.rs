//! Which arithmetic flags are read before they are replaced.
//!
//! The guest's flags live in the host's. At a block's end all of them count as read. What is visible of
//! those that nothing reads is another matter: see [`super::visible`].

use iced_x86::{FlowControl, Instruction, Mnemonic, RflagsBits};

use super::form::{FlagUse, Forms};

/// The carry, as iced has it.
pub(crate) const CF: u8 = RflagsBits::CF as u8;
/// CF, PF, AF, ZF, SF and OF.
pub(crate) const ARITHMETIC: u8 = {
    use RflagsBits as F;
    (F::CF | F::PF | F::AF | F::ZF | F::SF | F::OF) as u8
};

fn arithmetic(flags: u32) -> u8 {
    flags as u8 & ARITHMETIC
}

/// What instructions of a form do with flags, whatever their operands and prefixes are.
///
/// A flag that the manuals leave undefined may be one that the silicon leaves alone; only for the
/// logical instructions is it known not to be. A shift by zero leaves all of them alone, and so does a
/// string instruction that is repeated zero times.
pub(super) fn of_form(instruction: &Instruction) -> FlagUse {
    use Mnemonic as M;
    let written = || {
        let some = instruction.rflags_cleared() | instruction.rflags_set();
        arithmetic(instruction.rflags_written() | some)
    };
    let known = FlagUse {
        read: arithmetic(instruction.rflags_read()),
        replaced: 0,
        touched: arithmetic(instruction.rflags_modified()),
    };
    let shift = FlagUse {
        read: 0,
        replaced: 0,
        touched: ARITHMETIC,
    };
    match instruction.mnemonic() {
        M::And | M::Or | M::Xor | M::Test | M::Add | M::Sub | M::Cmp | M::Adc | M::Sbb | M::Neg => {
            FlagUse {
                replaced: ARITHMETIC,
                ..known
            }
        }
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Shld | M::Shrd => shift,
        M::Rcl | M::Rcr => FlagUse { read: CF, ..shift },
        _ if instruction.is_string_instruction() => known,
        _ => FlagUse {
            replaced: written(),
            ..known
        },
    }
}

/// What instructions of a form mean for those in front of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passing {
    read: u8,
    replaced: u8,
}

/// Behind a block's last instruction all flags are wanted.
pub(super) const AT_END: u8 = ARITHMETIC;

impl Passing {
    pub(super) fn of(instruction: &Instruction, uses: FlagUse) -> Self {
        let conditional = instruction.flow_control() == FlowControl::ConditionalBranch;
        let system = crate::system::is_system(instruction);
        let popf = instruction.mnemonic() == Mnemonic::Popfq;
        let division = matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        // What runs where a branch leads is not known; while a system instruction is done others may
        // look. The handler of #DE sees all flags; the division takes long enough.
        let behind = conditional || system && !popf;
        let read = match (division, behind) {
            (true, _) => ARITHMETIC,
            (_, true) => ARITHMETIC & !uses.replaced | uses.read,
            _ => uses.read,
        };
        let all = division || behind;
        Self {
            read,
            replaced: if all { ARITHMETIC } else { uses.replaced },
        }
    }

    /// The flags live in front of it, given those behind it.
    pub(super) fn before(self, wanted: u8) -> u8 {
        wanted & !self.replaced | self.read
    }
}

/// The flags live before each instruction.
pub(super) fn live(instructions: &[Instruction], forms: &Forms) -> Vec<u8> {
    let mut wanted = AT_END;
    let mut live: Vec<_> = instructions
        .iter()
        .rev()
        .map(|instruction| {
            wanted = forms.of(instruction).conduct.passing.before(wanted);
            wanted
        })
        .collect();
    live.reverse();
    live
}
