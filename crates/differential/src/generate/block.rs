//! Whole programs: straight code, forward branches, bounded loops, calls, indirect jumps.
//!
//! ```text
//!   body:   items ...                one register holds the base of most memory operands,
//!           jcc forward              one counts loops; no item writes either
//!           loop: items, dec, jnz
//!           call -> subroutine
//!           INT3
//!   subroutine: items ... ret
//! ```
//!
//! A fault in the middle is as good an end as the `INT3`: everything before it must have happened,
//! and nothing after.

use fastrand::Rng;
use iced_x86::{
    BlockEncoder, BlockEncoderOptions, CpuidFeature as F, EncodingKind, FlowControl, Instruction,
    InstructionBlock, Mnemonic, OpCodeOperandKind as K,
};

use super::catalogue::{Catalogue, Form};
use super::state;
use super::steps::Builder;
use crate::case::{Case, Mode, Patch, Program, State};
use crate::layout::{CODE, CODE_BYTES, PAGE, WINDOWS, WRITABLE_BYTES};

/// Forms that blocks are made of.
pub struct Forms {
    pub(super) mode: Mode,
    /// Integer instructions: half of what is drawn.
    pub(super) integer: Vec<Form>,
    /// All of them.
    pub(super) all: Vec<Form>,
}

impl Forms {
    /// Those of the catalogue that neither leave the block nor end it for sure.
    pub fn new(catalogue: &Catalogue, mode: Mode) -> Self {
        let all: Vec<_> = catalogue.forms.iter().copied().filter(fits).collect();
        let integer = all.iter().copied().filter(is_integer).collect();
        Self { mode, integer, all }
    }
}

/// Whether a block goes on behind the instruction, and doesn't mostly fault from there on.
fn fits(form: &Form) -> bool {
    let info = form.code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(form.code);
    let leaves = info.is_privileged()
        || info.may_require_cpl0()
        || info.is_input_output()
        || !form.tolerance.is_exact()
        || instruction.flow_control() != FlowControl::Next;
    let operands_upset = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            K::seg_reg
                | K::es
                | K::cs
                | K::ss
                | K::ds
                | K::fs
                | K::gs
                | K::mem_vsib32x
                | K::mem_vsib32y
                | K::mem_vsib64x
                | K::mem_vsib64y
        )
    });
    !leaves && !operands_upset && !upsets(form.code.mnemonic())
}

/// Loads of whole states, from memory that holds none; and stores of x87 state, whose pointers the host's kernel may lose between two instructions
/// (on AMD's CPUs it saves them only while an exception waits).
fn upsets(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Leave
            | Mnemonic::Enter
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Lss
            | Mnemonic::Into
            | Mnemonic::Bound
            | Mnemonic::Popa
            | Mnemonic::Popad
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Ldmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Fldcw
            | Mnemonic::Fldenv
            | Mnemonic::Frstor
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
    )
}

fn is_integer(form: &Form) -> bool {
    form.code.op_code().encoding() == EncodingKind::Legacy
        && form.code.cpuid_features().iter().all(|feature| {
            matches!(
                feature,
                F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::CMOV
                    | F::CX8
            )
        })
}

/// Draws a program and states for it.
pub fn draw(
    forms: &Forms,
    index: u32,
    states: usize,
    rng: &mut Rng,
) -> Option<(Program, Vec<Case>)> {
    let (items, base) = Builder::new(forms, rng).build()?;
    let length = encode(&items, forms.mode, 0)?.len();
    let latest = CODE_BYTES.checked_sub(length + 1)?;
    let offset = if rng.bool() {
        PAGE - rng.usize(..length.min(PAGE))
    } else {
        rng.usize(..latest)
    };
    // What is relative to RIP depends on the place.
    let program = Program::new(forms.mode, offset, &encode(&items, forms.mode, offset)?)?;
    let cases = (0..states).map(|_| case(base, forms.mode, index, rng));
    Some((program, cases.collect()))
}

fn encode(items: &[Instruction], mode: Mode, offset: usize) -> Option<Vec<u8>> {
    let block = InstructionBlock::new(items, CODE.raw() + offset as u64 - mode.code_base());
    let options = BlockEncoderOptions::NONE;
    let result = BlockEncoder::encode(mode.bitness(), block, options).ok()?;
    Some(result.code_buffer)
}

/// A state in which most instructions do not fault.
fn case(base: usize, mode: Mode, index: u32, rng: &mut Rng) -> Case {
    let mut state = state::random(mode, rng);
    state.rflags &= !state::TRAP_FLAG;
    if rng.u8(..8) != 0 {
        state.rflags &= !state::DIRECTION_FLAG;
    }
    if rng.u8(..8) != 0 {
        let plain = State::initial().extended;
        state.extended.0[..24].copy_from_slice(&plain.0[..24]);
        state.extended.0[4] = rng.u8(..);
        state.extended.set_mxcsr(plain.mxcsr());
    }
    let window = usize::from(mode == Mode::Long && rng.bool());
    let alignment = if rng.u8(..4) == 0 { !0 } else { !63 };
    let place = 0x800 + rng.u64(..WRITABLE_BYTES as u64 - 0x1000);
    state.gpr[base] = WINDOWS[window].raw() + (place & alignment) - mode.data_base();
    let place = 0x800 + rng.u64(..WRITABLE_BYTES as u64 - 0x1000);
    state.gpr[4] = WINDOWS[0].raw() + (place & !7) - mode.data_base();
    Case {
        program: index,
        state,
        patches: [Patch::EMPTY; 3],
    }
}
