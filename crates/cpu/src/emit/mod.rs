//! Writing host machine code: a small assembler for fixed sequences, and the guest's own
//! instructions with their operands exchanged.

pub(crate) mod asm;
pub(crate) mod raw;

pub(crate) use asm::{Asm, Fixup, Mem, Reg};
pub(crate) use raw::{Operands, Raw, Rm};
