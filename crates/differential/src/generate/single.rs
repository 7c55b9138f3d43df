//! Programs of one instruction.

use fastrand::Rng;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::catalogue::Form;
use super::operands::{self, Choice, Encoded};
use super::{addresses, selector, state};
use crate::case::{Case, Mode, Patch, Program, State};
use crate::layout::{CODE_BYTES, PAGE};

/// Draws a program that holds one instruction of this form.
pub fn program(form: Form, rng: &mut Rng) -> Option<(Program, Encoded)> {
    let offset = place(rng);
    let ip = crate::layout::CODE.raw() + offset as u64 - form.mode.code_base();
    let mut choice = Choice::ALL;
    if is_xsave(form.code.mnemonic()) {
        // EDX and EAX select components: they can't be addresses too.
        choice.gprs &= !0b101;
    }
    let encoded = (0..DRAWS).find_map(|_| {
        let encoded = operands::build(form, ip, choice, rng)?;
        is_allowed(&encoded.instruction).then_some(encoded)
    })?;
    let program = Program::new(form.mode, offset, &encoded.bytes)?;
    Some((program, encoded))
}

/// How often an instruction is drawn until it is one that may be compared.
const DRAWS: usize = 8;

/// An address-size prefix in 16-bit code makes other registers the address than were chosen.
fn is_allowed(instruction: &Instruction) -> bool {
    let selects = |register: Register| {
        let full = register.full_register();
        full == Register::RAX || full == Register::RDX
    };
    let address = [instruction.memory_base(), instruction.memory_index()];
    !is_xsave(instruction.mnemonic()) || !address.into_iter().any(selects)
}

/// Anywhere in the code window, often where the instruction crosses into the next page.
fn place(rng: &mut Rng) -> usize {
    if rng.u8(..8) == 0 {
        PAGE * rng.usize(1..CODE_BYTES / PAGE) - rng.usize(1..8)
    } else {
        rng.usize(..CODE_BYTES - 32)
    }
}

/// Draws a state from which the instruction does something worth comparing.
pub fn case(mode: Mode, program: u32, instruction: &Instruction, rng: &mut Rng) -> Case {
    let mut state = state::random(mode, rng);
    prepare(instruction, mode, &mut state, rng);
    let mut patches = addresses::place(instruction, mode, &mut state, rng);
    adjust(instruction, &mut state, &mut patches, rng);
    Case {
        program,
        state,
        patches,
    }
}

/// What must be set before the addresses are solved.
fn prepare(instruction: &Instruction, mode: Mode, state: &mut State, rng: &mut Rng) {
    let counted = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if counted && rng.u8(..16) != 0 {
        state.gpr[1] = rng.u64(..80);
    } else if counted {
        state.gpr[1] = rng.u64(..0x4000);
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts
    ) && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register
        && rng.u8(..8) != 0
    {
        let bit = rng.i64(-4000..4000) as u64;
        let value = if mode == Mode::Long {
            bit
        } else {
            bit & 0xffff_ffff
        };
        set_register(state, instruction.op1_register(), value);
    }
    if is_xsave(instruction.mnemonic()) {
        // The components beyond AVX are the host's alone.
        state.gpr[0] &= 7;
        state.gpr[2] = 0;
    }
}

/// What depends on where the operands turned out to be.
fn adjust(instruction: &Instruction, state: &mut State, patches: &mut [Patch; 3], rng: &mut Rng) {
    match instruction.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if rng.u8(..3) != 0 => {
            let sign = (state.gpr[0] as i64 >> 63) as u64;
            state.gpr[2] = if rng.bool() { sign } else { rng.u64(..4) };
        }
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if rng.bool() => {
            patches[0].bytes[..8].copy_from_slice(&state.gpr[0].to_le_bytes());
            let half = if instruction.code() == Code::Cmpxchg8b_m64 {
                4
            } else {
                8
            };
            patches[0].bytes[half..half + 8].copy_from_slice(&state.gpr[2].to_le_bytes());
        }
        Mnemonic::Xrstor | Mnemonic::Xrstor64 => xrstor_image(patches, rng),
        _ if uses_selector(instruction) => {
            let value = selector(rng);
            for patch in patches {
                let at = (patch.len as usize).saturating_sub(2);
                patch.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            for operand in 0..instruction.op_count() {
                let register = instruction.op_register(operand);
                if register.is_gpr() {
                    set_register(state, register, u64::from(value));
                }
            }
        }
        _ => {}
    }
}

fn is_xsave(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    )
}

/// A header that is mostly valid (SDM 1, 13.4.2), and an MXCSR.
fn xrstor_image(patches: &mut [Patch; 3], rng: &mut Rng) {
    let start = patches[0].offset;
    if patches[0].len == 0 || start as usize + 832 > crate::layout::DATA_BYTES {
        return;
    }
    patches[0].bytes[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    patches[0].len = 64;
    let mut header = Patch {
        offset: start + 512,
        len: 64,
        bytes: [0; 64],
    };
    header.bytes[0] = rng.u8(..8);
    if rng.u8(..8) == 0 {
        header.bytes[rng.usize(1..24)] = 1;
    }
    patches[1] = header;
}

/// Whether an operand is a selector, which must be one that both descriptor tables have.
fn uses_selector(instruction: &Instruction) -> bool {
    let loads = matches!(
        instruction.mnemonic(),
        Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Lss
            | Mnemonic::Retf
    ) || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect();
    let segment = |operand| {
        let register: Register = instruction.op_register(operand);
        register.is_segment_register()
    };
    loads || (0..instruction.op_count()).any(segment)
}

fn set_register(state: &mut State, register: Register, value: u64) {
    let full = register.full_register();
    if (Register::RAX..=Register::R15).contains(&full) {
        state.gpr[full as usize - Register::RAX as usize] = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::MODES;
    use crate::generate::Catalogue;

    #[test]
    fn what_selects_components_is_no_address() {
        let mut rng = Rng::with_seed(317);
        let mut drawn = 0;
        for mode in MODES {
            let catalogue = Catalogue::new(mode);
            let forms = catalogue.forms.iter();
            for form in forms.filter(|form| is_xsave(form.code.mnemonic())) {
                for _ in 0..500 {
                    let (_, encoded) = program(*form, &mut rng).unwrap();
                    let instruction = encoded.instruction;
                    for register in [instruction.memory_base(), instruction.memory_index()] {
                        let full = register.full_register();
                        assert!(
                            full != Register::RAX && full != Register::RDX,
                            "{instruction}"
                        );
                    }
                    drawn += 1;
                }
            }
        }
        assert!(drawn > 3000, "only {drawn}");
    }
}
