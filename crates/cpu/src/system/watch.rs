//! Data breakpoints, found by looking at the instruction before it runs.
//!
//! While one is enabled, instructions run one by one, and each is asked which memory it will touch.
//! Translated code needs to know nothing of this.

use addr::{Address, Gva, PageSize};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, Register};
use x86::descriptor::attributes;

use super::debug::{DataAccess, data_breakpoints, watched_ranges};
use super::{Context, GuestDebug};
use crate::CpuState;

/// The longest instruction.
const LONGEST: usize = 15;

/// Whether any data breakpoint is enabled.
pub(super) fn has_data_breakpoints(state: &CpuState, guest_debug: &GuestDebug) -> bool {
    watched_ranges(state, guest_debug).next().is_some()
}

impl Context<'_> {
    /// Bits of DR6 for the data breakpoints that the instruction at RIP will meet.
    pub(super) fn data_breakpoints_ahead(&mut self) -> u64 {
        if !has_data_breakpoints(self.state, self.guest_debug) {
            return 0;
        }
        let Some(instruction) = self.instruction_ahead() else {
            return 0;
        };
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&instruction);
        let mut bits = 0;
        for memory in info.used_memory() {
            let address =
                memory.virtual_address(0, |register, _, _| register_value(self.state, register));
            let Some(address) = address else {
                continue;
            };
            let len = memory.memory_size().size().max(1) as u64;
            for access in kinds(memory.access()) {
                let at = Gva::new(self.truncated(address));
                bits |= data_breakpoints(self.state, self.guest_debug, at, len, *access);
            }
        }
        bits
    }

    fn truncated(&self, linear: u64) -> u64 {
        if self.state.is_64bit() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// The instruction at RIP, as far as it can be read.
    fn instruction_ahead(&mut self) -> Option<Instruction> {
        let start = self.linear_rip();
        let in_page = PageSize::Size4K.bytes() - start.page_offset(PageSize::Size4K);
        let first = LONGEST.min(in_page as usize);
        let privilege = self.state.explicit_privilege();
        let mut bytes = [0; LONGEST];
        self.memory
            .read(start, &mut bytes[..first], privilege)
            .ok()?;
        let mut len = first;
        if first < LONGEST {
            let next = start.wrapping_add(first as u64);
            if self
                .memory
                .read(next, &mut bytes[first..], privilege)
                .is_ok()
            {
                len = LONGEST;
            }
        }
        let bitness = if self.state.is_64bit() {
            64
        } else if self.state.segments.cs.attributes & attributes::DB != 0 {
            32
        } else {
            16
        };
        let rip = self.state.rip;
        let mut decoder = Decoder::with_ip(bitness, &bytes[..len], rip, DecoderOptions::NONE);
        Some(decoder.decode())
    }
}

/// The value that a register adds to an address; of a segment register its base.
fn register_value(state: &CpuState, register: Register) -> Option<u64> {
    if register.is_segment_register() {
        let flat = state.is_64bit() && !matches!(register, Register::FS | Register::GS);
        return Some(if flat {
            0
        } else {
            state.segments.get(register).base
        });
    }
    register.is_gpr().then(|| state.register(register))
}

/// What an operand's access is to a breakpoint.
fn kinds(access: OpAccess) -> &'static [DataAccess] {
    match access {
        OpAccess::Read | OpAccess::CondRead => &[DataAccess::Read],
        OpAccess::Write | OpAccess::CondWrite => &[DataAccess::Write],
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => &[DataAccess::Read, DataAccess::Write],
        _ => &[],
    }
}
