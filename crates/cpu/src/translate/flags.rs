//! Which arithmetic flags are read before they are replaced.
//!
//! The guest's flags live in the host's. At a block's end all of them count as read. What is visible of
//! those that nothing reads is another matter: see [`super::visible`].

use iced_x86::{Instruction, Mnemonic, RflagsBits};

use super::form::{FlagUse, Forms, Traits};

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

/// Which flags are live, from a block's last instruction to its first.
#[derive(Debug)]
pub(super) struct Liveness {
    wanted: u8,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { wanted: ARITHMETIC }
    }
}

impl Liveness {
    /// Goes in front of an instruction, which uses flags so: those live there.
    pub(super) fn before(
        &mut self,
        instruction: &Instruction,
        traits: Traits,
        uses: FlagUse,
    ) -> u8 {
        // What runs where a branch leads is not known. Code of all kinds comes by: what can do without
        // a branch of the host's does.
        let conditional = u8::from(traits.contains(Traits::CONDITIONAL));
        self.wanted |= ARITHMETIC & conditional.wrapping_neg();
        if traits.contains(Traits::SYSTEM) && instruction.mnemonic() != Mnemonic::Popfq {
            // Others may look while it is done.
            self.wanted = ARITHMETIC;
        }
        self.wanted = self.wanted & !uses.replaced | uses.read;
        if traits.contains(Traits::DIVISION) {
            // The handler of #DE sees them; the division takes long enough.
            self.wanted = ARITHMETIC;
        }
        self.wanted
    }
}

/// The flags live before each instruction, handed out from the last to the first.
pub(super) fn live(instructions: &[Instruction], forms: &Forms, mut each: impl FnMut(usize, u8)) {
    let mut liveness = Liveness::default();
    for (at, instruction) in instructions.iter().enumerate().rev() {
        let form = forms.of(instruction);
        each(at, liveness.before(instruction, form.traits, form.flags));
    }
}
