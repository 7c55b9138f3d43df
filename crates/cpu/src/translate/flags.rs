//! Which arithmetic flags matter where.
//!
//! The guest's flags live in the host's. A TLB check that may destroy them is shorter than one that
//! keeps them, so for each instruction it is worked out whether any flag that it finds is read before
//! it is written again in the same block. At a block's end all flags count as read.
//!
//! An instruction that can fault shows the guest the flags as they are before it. [`FlagsAtFaults`]
//! says whether that counts.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, RflagsBits};

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

/// Whether flags are live before each instruction, given in order.
pub(crate) fn liveness(instructions: &[Instruction], policy: FlagsAtFaults, live: &mut Vec<bool>) {
    live.clear();
    live.extend(
        masks(instructions, policy)
            .into_iter()
            .map(|mask| mask != 0),
    );
}

/// Which flags are live before each instruction, given in order.
pub(super) fn masks(instructions: &[Instruction], policy: FlagsAtFaults) -> Vec<u32> {
    let mut live = vec![ARITHMETIC; instructions.len()];
    let mut wanted = ARITHMETIC;
    for (instruction, live) in instructions.iter().zip(live.iter_mut()).rev() {
        if instruction.flow_control() == FlowControl::ConditionalBranch {
            // What runs where it leads is not known.
            wanted = ARITHMETIC;
        }
        if crate::system::is_system(instruction) && instruction.mnemonic() != Mnemonic::Popfq {
            // Others may look while it is done.
            wanted = ARITHMETIC;
        }
        wanted = wanted & !replaced(instruction) | instruction.rflags_read() & ARITHMETIC;
        if matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
            // The handler of #DE sees them; the division takes long enough.
            wanted = ARITHMETIC;
        }
        if policy == FlagsAtFaults::Exact && may_fault(instruction) {
            wanted = ARITHMETIC;
        }
        *live = wanted;
    }
    live
}

fn may_fault(instruction: &Instruction) -> bool {
    instruction.is_stack_instruction()
        || (0..instruction.op_count()).any(|i| {
            !matches!(
                instruction.op_kind(i),
                OpKind::Register
                    | OpKind::Immediate8
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate32to64
                    | OpKind::Immediate64
            )
        })
}
