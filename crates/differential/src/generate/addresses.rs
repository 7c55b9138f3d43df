//! Makes memory operands point somewhere interesting.
//!
//! The instruction is fixed; the registers are not. For each access that iced reports, explicit or
//! implied, a target is drawn and the base register solved for it.

use fastrand::Rng;
use iced_x86::{CodeSize, Instruction, InstructionInfoFactory, Register, UsedMemory};

use super::values;
use crate::case::{Mode, Patch, State};
use crate::layout::{DATA_BYTES, PAGE, WINDOWS, WRITABLE_BYTES, data_offset};

/// Bytes of an area whose size iced doesn't know: those of XSAVE (SDM 1, 13.4).
const AREA: u64 = 832;
/// The most patches a case has.
const PATCHES: usize = 3;

/// Sets the registers that address memory, and the memory that they address.
pub fn place(
    instruction: &Instruction,
    mode: Mode,
    state: &mut State,
    rng: &mut Rng,
) -> [Patch; PATCHES] {
    let mut placer = Placer {
        mode,
        state,
        rng,
        pinned: 0,
        patches: [Patch::EMPTY; PATCHES],
        used: 0,
    };
    let mut factory = InstructionInfoFactory::new();
    for memory in factory.info(instruction).used_memory() {
        placer.place(memory);
    }
    placer.patches
}

impl Patch {
    /// No bytes.
    pub const EMPTY: Self = Self {
        offset: 0,
        len: 0,
        bytes: [0; 64],
    };
}

struct Placer<'a> {
    mode: Mode,
    state: &'a mut State,
    rng: &'a mut Rng,
    /// Registers that an earlier access depends on, one bit each.
    pinned: u16,
    patches: [Patch; PATCHES],
    used: usize,
}

impl Placer<'_> {
    fn place(&mut self, memory: &UsedMemory) {
        if memory.vsib_size() != 0 {
            self.place_vector_index(memory);
        }
        let whole = match memory.memory_size().size() {
            0 => AREA,
            size => size as u64,
        };
        let size = whole.min(64);
        let mut target = self.target(whole, memory.address_size());
        if whole >= AREA && self.rng.u8(..4) != 0 {
            target &= !63;
        }
        self.aim(memory, target);
        self.patch(target, size);
    }

    /// Solves for the base, or where there is none for the index.
    fn aim(&mut self, memory: &UsedMemory, target: u64) {
        let rest = target
            .wrapping_sub(memory.displacement())
            .wrapping_sub(self.segment_base(memory.segment()));
        let (base, index) = (number(memory.base()), number(memory.index()));
        let scale = u64::from(memory.scale());
        match (base, index) {
            (Some(base), Some(index)) if base == index => {
                self.set(base, rest / (scale + 1), memory);
            }
            (Some(base), Some(index)) if self.is_pinned(base) => {
                let offset = rest.wrapping_sub(self.state.gpr[base]);
                self.set(index, offset / scale, memory);
            }
            (Some(base), index) => {
                let offset = index.map_or(0, |index| {
                    self.value(memory.index(), index).wrapping_mul(scale)
                });
                self.set(base, rest.wrapping_sub(offset), memory);
            }
            (None, Some(index)) => self.set(index, rest / scale, memory),
            (None, None) => {}
        }
    }

    fn is_pinned(&self, register: usize) -> bool {
        self.pinned >> register & 1 != 0
    }

    fn set(&mut self, register: usize, value: u64, memory: &UsedMemory) {
        if self.is_pinned(register) {
            return;
        }
        self.pinned |= 1 << register;
        let narrow = memory.address_size() != CodeSize::Code64;
        self.state.gpr[register] = match (self.mode, narrow) {
            (Mode::Compat16, _) if memory.address_size() == CodeSize::Code16 => {
                value & 0xffff | self.rng.u64(..) << 16 & 0xffff_0000
            }
            (Mode::Compat32 | Mode::Compat16, _) => value & 0xffff_ffff,
            // What lies above a 32-bit address must not matter.
            (Mode::Long, true) => value & 0xffff_ffff | self.rng.u64(..) << 32,
            (Mode::Long, false) => value,
        };
    }

    /// The index as the access sees it: `XLATB` uses AL.
    fn value(&mut self, register: Register, number: usize) -> u64 {
        // A scaled index that is a large number makes the sum wrap, which must work too.
        if !self.is_pinned(number) && self.rng.u8(..4) != 0 {
            self.state.gpr[number] = self.rng.u64(..512);
        }
        let value = self.state.gpr[number];
        match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    fn segment_base(&self, segment: Register) -> u64 {
        match segment {
            Register::FS => self.state.fs_base,
            Register::GS => self.state.gs_base,
            _ => self.mode.data_base(),
        }
    }

    /// Where the access shall go.
    fn target(&mut self, size: u64, address_size: CodeSize) -> u64 {
        let (page, writable, present) = (PAGE as u64, WRITABLE_BYTES as u64, DATA_BYTES as u64);
        let aligned = !(size.next_power_of_two().min(64) - 1);
        let inside = self.rng.u64(..writable - 64);
        let before = 1 + self.rng.u64(..size.max(2));
        let offset = match self.rng.u8(..100) {
            0..50 => inside & aligned & !15,
            50..70 => inside,
            70..82 => page * self.rng.u64(1..3) - before,
            82..87 => (writable + self.rng.u64(..page - 64)) & aligned,
            87..90 => writable - before,
            90..94 => present - before,
            94..96 => present + self.rng.u64(..page),
            96..98 => before.wrapping_neg(),
            _ => return self.wild(),
        };
        let high = self.mode == Mode::Long && address_size != CodeSize::Code32 && self.rng.bool();
        WINDOWS[usize::from(high)].raw().wrapping_add(offset)
    }

    /// Nothing is there: near the ends of the address space, or not canonical.
    fn wild(&mut self) -> u64 {
        let any = self.rng.u64(..);
        match self.rng.u8(..5) {
            0 => any >> 47 << 47 | 0x1000,
            1 => 0x0000_7fff_ffff_fff0 + any % 32,
            2 => 0xffff_8000_0000_0000 - 16 + any % 32,
            3 => (any % 32).wrapping_sub(16),
            _ => any | 1 << 62,
        }
    }

    /// An interesting value where the access will read.
    fn patch(&mut self, target: u64, size: u64) {
        let Some(offset) = data_offset(addr::Gva::new(target)) else {
            return;
        };
        if self.used == PATCHES {
            return;
        }
        let len = (size as usize).min(DATA_BYTES - offset);
        let mut patch = Patch {
            offset: offset as u32,
            len: len as u32,
            ..Patch::EMPTY
        };
        values::fill(self.rng, &mut patch.bytes[..len]);
        self.patches[self.used] = patch;
        self.used += 1;
    }

    /// Elements a few hundred bytes apart, so that the base decides where they lie.
    fn place_vector_index(&mut self, memory: &UsedMemory) {
        let register = memory.index();
        let index = register.number() % 32;
        let mut value = [0; 32];
        let size = memory.vsib_size() as usize;
        for element in value.chunks_mut(size) {
            let offset = self.rng.i64(-300..300).to_le_bytes();
            element.copy_from_slice(&offset[..size]);
        }
        self.state.extended.set_ymm(index, &value);
    }
}

/// The number of a general register, or `None` for others (RIP, vectors, none).
fn number(register: Register) -> Option<usize> {
    let full = register.full_register();
    (Register::RAX..=Register::R15)
        .contains(&full)
        .then(|| full as usize - Register::RAX as usize)
}
