//! Random register states, with the corners more often than chance would have them.

use fastrand::Rng;

use super::values;
use crate::case::{Extended, Mode, State};
use crate::layout::{DATA_BYTES, WINDOWS};

/// CF, PF, AF, ZF, SF, OF.
pub const ARITHMETIC_FLAGS: u64 = 0x8d5;
/// DF.
pub const DIRECTION_FLAG: u64 = 0x400;
/// TF.
pub const TRAP_FLAG: u64 = 0x100;
/// IF and the bit that is always set.
const ALWAYS: u64 = 0x202;

/// Registers at random; those that address memory are set afterwards
/// ([`super::addresses::place`]).
pub fn random(mode: Mode, rng: &mut Rng) -> State {
    let mut state = State::initial();
    for register in &mut state.gpr {
        *register = general(rng);
        if mode != Mode::Long {
            *register &= 0xffff_ffff;
        }
    }
    if mode != Mode::Long {
        state.gpr[8..].fill(0);
    }
    state.rflags = flags(rng);
    state.selectors = mode.selectors();
    state.fs_base = WINDOWS[0].raw() + rng.u64(..DATA_BYTES as u64);
    state.gs_base = rng.u64(..0x1000_0000);
    if mode == Mode::Long && rng.bool() {
        state.gs_base = (WINDOWS[1].raw() - 0x800_0000) + rng.u64(..0x1000_0000);
    }
    if mode == Mode::Compat16 {
        // As loading the selectors makes them.
        (state.fs_base, state.gs_base) = (mode.data_base(), mode.data_base());
    }
    extended(&mut state.extended, mode, rng);
    state
}

fn general(rng: &mut Rng) -> u64 {
    if rng.u8(..8) == 0 {
        WINDOWS[rng.usize(..2)].raw() + rng.u64(..DATA_BYTES as u64)
    } else {
        values::integer(rng)
    }
}

fn flags(rng: &mut Rng) -> u64 {
    let mut flags = ALWAYS | (rng.u64(..) & ARITHMETIC_FLAGS);
    if rng.u8(..12) == 0 {
        flags |= DIRECTION_FLAG;
    }
    if rng.u8(..40) == 0 {
        flags |= TRAP_FLAG;
    }
    flags
}

fn extended(extended: &mut Extended, mode: Mode, rng: &mut Rng) {
    let vectors = if mode == Mode::Long { 16 } else { 8 };
    for index in 0..vectors {
        let mut value = [0; 32];
        values::fill(rng, &mut value);
        extended.set_ymm(index, &value);
    }
    extended.set_mxcsr(mxcsr(rng));
    x87(extended, rng);
}

/// Rounding, denormals, masks and sticky flags (SDM 1, 10.2.3).
fn mxcsr(rng: &mut Rng) -> u32 {
    const MASKS: u32 = 0x1f80;
    match rng.u8(..10) {
        0..5 => MASKS,
        5..9 => MASKS | (rng.u32(..) & 0xe07f),
        _ => rng.u32(..) & 0xffff,
    }
}

/// Control word, stack, tags, and sometimes an exception that waits (SDM 1, 8.1).
fn x87(extended: &mut Extended, rng: &mut Rng) {
    let control = match rng.u8(..10) {
        0..5 => 0x37f,
        5..9 => 0x7f | (rng.u16(..) & 0x0f00),
        _ => 0x40 | (rng.u16(..) & 0x0f3f),
    };
    let mut status = (rng.u16(..8) << 11) | (rng.u16(..) & 0x4700);
    if rng.u8(..8) == 0 {
        status |= rng.u16(..) & 0x7f;
    }
    // ES and B are what the flags and masks make of them.
    if status & 0x3f & !control != 0 {
        status |= 0x8080;
    }
    let tags = match rng.u8(..4) {
        0 => 0xff,
        1 => 0,
        _ => rng.u8(..),
    };
    extended.set_word(0, control);
    extended.set_word(2, status);
    extended.0[4] = tags;
    for index in 0..8 {
        extended.st_mut(index)[..10].copy_from_slice(&values::extended(rng));
    }
}
