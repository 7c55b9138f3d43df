//! `IN`, `OUT`, `INS`, `OUTS` (SDM 1, chapter 20; SDM 3A, 9.2.1 for the permission bitmap).

use addr::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::control::Cr4;
use x86::debug::{Condition, DR7_ENABLE_ALL, breakpoint};
use x86::descriptor::{attributes, system_type};
use x86::rflags;
use x86::tss::tss32;

use super::fault::general;
use super::operand::{Want, linear};
use super::registers::merge;
use super::{Abort, Context, Effects, Next, PendingExit, Privilege};
use crate::platform::Handled;
use crate::state::gpr;
use crate::{Exit, IoDirection, IoExit};

/// The most bytes that one run of a string instruction moves: a quarter of the page that
/// `KVM_RUN` has for them.
const MAX_CHUNK: u64 = 1024;

/// One access of an `IN` or `OUT`.
#[derive(Clone, Copy)]
struct Port {
    number: u16,
    size: u8,
}

/// A string instruction: its element, its addresses, what is left to do.
struct StringIo {
    port: Port,
    segment: Register,
    /// Bits of SI, DI and CX that count.
    mask: u64,
    index: u64,
    /// Elements still to move; 1 without REP.
    left: u64,
    repeated: bool,
    down: bool,
}

impl StringIo {
    /// How many elements of the next ones lie in one page, upwards, without wrapping.
    fn run_length(&self, gva: Gva) -> u64 {
        if self.down {
            return 1;
        }
        let size = u64::from(self.port.size);
        let in_page = (0x1000 - (gva.raw() & 0xfff)) / size;
        let to_wrap = (self.mask - self.index) / size;
        in_page
            .min(to_wrap)
            .min(MAX_CHUNK / size)
            .clamp(1, self.left)
    }

    /// The index register after so many elements.
    fn advanced(&self, count: u64) -> u64 {
        let bytes = count * u64::from(self.port.size);
        let delta = if self.down {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        self.index.wrapping_add(delta) & self.mask
    }
}

impl Context<'_> {
    /// `#GP(0)` unless the port may be touched: by IOPL, or by the bitmap in the TSS.
    fn check_port(&mut self, port: Port) -> Result<(), Abort> {
        let state = &*self.state;
        if !state.is_protected() {
            return Ok(());
        }
        let virtual8086 = state.flags_have(rflags::VM) && !state.is_long_active();
        if !virtual8086 && state.cpl() <= state.iopl() {
            return Ok(());
        }
        if self.bitmap_allows(port)? {
            Ok(())
        } else {
            Err(general())
        }
    }

    fn bitmap_allows(&mut self, port: Port) -> Result<bool, Abort> {
        let tr = self.state.segments.tr;
        let kind = (tr.attributes & attributes::TYPE) as u8;
        let is_wide = matches!(kind, system_type::TSS_AVAILABLE | system_type::TSS_BUSY);
        if tr.unusable || !is_wide || tr.limit < tss32::MIN_LIMIT {
            return Ok(false);
        }
        let mut word = [0; 2];
        let at = |offset: u64| Gva::new(tr.base.wrapping_add(offset));
        self.memory.read(
            at(u64::from(tss32::IO_MAP_BASE)),
            &mut word,
            Privilege::Implicit,
        )?;
        let offset = u64::from(u16::from_le_bytes(word)) + u64::from(port.number / 8);
        if offset + 1 > u64::from(tr.limit) {
            return Ok(false);
        }
        self.memory
            .read(at(offset), &mut word, Privilege::Implicit)?;
        let bits = ((1u32 << port.size) - 1) << (port.number % 8);
        Ok(u32::from(u16::from_le_bytes(word)) & bits == 0)
    }

    /// Notes I/O breakpoints on a port (CR4.DE), which trap after the instruction.
    fn watch_port(&mut self, port: Port) {
        if self.state.dr7 & DR7_ENABLE_ALL == 0 || !self.state.cr4_has(Cr4::DE) {
            return;
        }
        for n in 0..4u32 {
            let at = breakpoint(self.state.dr7, n);
            let first = self.state.dr[n as usize] & !(at.len - 1);
            let port_first = u64::from(port.number);
            let overlaps = first < port_first + u64::from(port.size) && port_first < first + at.len;
            if at.enabled && at.condition == Condition::Io && overlaps {
                self.pending.debug |= 1 << n;
                self.effects |= Effects::EVENTS;
            }
        }
    }

    fn port_of(&self, instruction: &Instruction, n: u32, size: usize) -> Port {
        let number = if instruction.op_kind(n) == OpKind::Immediate8 {
            u16::from(instruction.immediate8())
        } else {
            self.state.gpr[gpr::RDX] as u16
        };
        Port {
            number,
            size: size as u8,
        }
    }

    /// `IN`.
    pub(super) fn port_in(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let port = self.port_of(instruction, 1, instruction.op0_register().size());
        self.check_port(port)?;
        self.watch_port(port);
        let next = self.next_rip(instruction);
        let mut data = [0; 8];
        let size = usize::from(port.size);
        match self.platform.port_read(port.number, &mut data[..size]) {
            Handled::Yes => {
                self.state
                    .set_accumulator(u64::from_le_bytes(data), u64::from(port.size));
                self.state.rip = next;
                Ok(Next::Sequential)
            }
            Handled::No => {
                let rip = self.state.rip;
                self.pending.exit = PendingExit::In {
                    rip,
                    next,
                    size: port.size,
                };
                Err(io_exit(port, IoDirection::In, 1))
            }
        }
    }

    /// `OUT`.
    pub(super) fn port_out(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let port = self.port_of(instruction, 0, instruction.op1_register().size());
        self.check_port(port)?;
        self.watch_port(port);
        let next = self.next_rip(instruction);
        let bytes = self.state.gpr[gpr::RAX].to_le_bytes();
        let data = &bytes[..usize::from(port.size)];
        self.effects |= Effects::EVENTS;
        if self.platform.port_write(port.number, data) == Handled::No {
            self.pending.exit = PendingExit::Out {
                rip: self.state.rip,
                next,
                data: data.to_vec(),
                rsi: self.state.gpr[gpr::RSI],
                rcx: self.state.gpr[gpr::RCX],
            };
            return Err(io_exit(port, IoDirection::Out, 1));
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    fn string_io(&self, instruction: &Instruction, index: usize, segment: Register) -> StringIo {
        let size = match instruction.mnemonic() {
            Mnemonic::Insb | Mnemonic::Outsb => 1,
            Mnemonic::Insw | Mnemonic::Outsw => 2,
            _ => 4,
        };
        let is_input = segment == Register::ES && index == gpr::RDI;
        let mask = string_address_mask(instruction.op_kind(u32::from(!is_input)));
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        StringIo {
            port: Port {
                number: self.state.gpr[gpr::RDX] as u16,
                size,
            },
            segment,
            mask,
            index: self.state.gpr[index] & mask,
            left: if repeated {
                self.state.gpr[gpr::RCX] & mask
            } else {
                1
            },
            repeated,
            down: self.state.flags_have(rflags::DF),
        }
    }

    /// After `count` elements: the registers, and whether the instruction is over.
    fn string_done(&mut self, io: &StringIo, index: usize, count: u64, next: u64) -> Next {
        self.state.gpr[index] = put_index(self.state.gpr[index], io.advanced(count), io.mask);
        if io.repeated {
            self.state.gpr[gpr::RCX] =
                put_index(self.state.gpr[gpr::RCX], io.left - count, io.mask);
            if io.left > count {
                return Next::Again;
            }
        }
        self.state.rip = next;
        Next::Sequential
    }

    /// `INS`.
    pub(super) fn string_in(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let io = self.string_io(instruction, gpr::RDI, Register::ES);
        let next = self.next_rip(instruction);
        self.check_port(io.port)?;
        if io.left == 0 {
            self.state.rip = next;
            return Ok(Next::Sequential);
        }
        let (gva, count) = self.string_run(&io, Want::Write)?;
        let privilege = self.state.explicit_privilege();
        if let Some(data) = self.take_string_answer() {
            return self.store_string(&io, gva, &data, next);
        }
        let size = usize::from(io.port.size);
        self.memory
            .check_write(gva, size * count as usize, privilege)?;
        self.watch_port(io.port);
        let mut data = [0; MAX_CHUNK as usize];
        for done in 0..count as usize {
            let element = &mut data[done * size..][..size];
            if self.platform.port_read(io.port.number, element) == Handled::No {
                return self.leave_string_in(&io, gva, &data[..done * size], next);
            }
        }
        self.memory
            .write(gva, &data[..size * count as usize], privilege)?;
        Ok(self.string_done(&io, gpr::RDI, count, next))
    }

    /// The platform doesn't know the port: what it gave so far is stored, or the monitor is asked.
    fn leave_string_in(
        &mut self,
        io: &StringIo,
        gva: Gva,
        so_far: &[u8],
        next: u64,
    ) -> Result<Next, Abort> {
        if !so_far.is_empty() {
            return self.store_string(io, gva, so_far, next);
        }
        self.pending.exit = PendingExit::Ins {
            rip: self.state.rip,
        };
        Err(io_exit(io.port, IoDirection::In, io.run_length(gva) as u32))
    }

    fn take_string_answer(&mut self) -> Option<Vec<u8>> {
        match std::mem::take(&mut self.pending.exit) {
            PendingExit::InsData { rip, data } if rip == self.state.rip => Some(data),
            _ => None,
        }
    }

    fn store_string(
        &mut self,
        io: &StringIo,
        gva: Gva,
        data: &[u8],
        next: u64,
    ) -> Result<Next, Abort> {
        let size = u64::from(io.port.size);
        let count = (data.len() as u64 / size).min(io.run_length(gva));
        if count == 0 {
            return Ok(Next::Again);
        }
        let privilege = self.state.explicit_privilege();
        if let Err(abort) = self
            .memory
            .write(gva, &data[..(count * size) as usize], privilege)
        {
            let rip = self.state.rip;
            self.pending.exit = PendingExit::InsData {
                rip,
                data: data.to_vec(),
            };
            return Err(abort);
        }
        Ok(self.string_done(io, gpr::RDI, count, next))
    }

    /// `OUTS`.
    pub(super) fn string_out(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let io = self.string_io(instruction, gpr::RSI, instruction.memory_segment());
        let next = self.next_rip(instruction);
        self.check_port(io.port)?;
        if io.left == 0 {
            self.state.rip = next;
            return Ok(Next::Sequential);
        }
        let (gva, count) = self.string_run(&io, Want::Read)?;
        let size = usize::from(io.port.size);
        let mut data = [0; MAX_CHUNK as usize];
        let data = &mut data[..size * count as usize];
        let privilege = self.state.explicit_privilege();
        self.memory.read(gva, data, privilege)?;
        self.watch_port(io.port);
        self.effects |= Effects::EVENTS;
        for (done, element) in data.chunks_exact(size).enumerate() {
            if self.platform.port_write(io.port.number, element) == Handled::No {
                if done > 0 {
                    return Ok(self.string_done(&io, gpr::RSI, done as u64, next));
                }
                return Err(self.leave_string_out(&io, data, count, next));
            }
        }
        Ok(self.string_done(&io, gpr::RSI, count, next))
    }

    fn leave_string_out(&mut self, io: &StringIo, data: &[u8], count: u64, next: u64) -> Abort {
        let (rip, rsi, rcx) = (
            self.state.rip,
            self.state.gpr[gpr::RSI],
            self.state.gpr[gpr::RCX],
        );
        let left = if io.repeated { io.left - count } else { 0 };
        self.pending.exit = PendingExit::Out {
            rip,
            next: if left == 0 { next } else { rip },
            data: data.to_vec(),
            rsi: put_index(rsi, io.advanced(count), io.mask),
            rcx: if io.repeated {
                put_index(rcx, left, io.mask)
            } else {
                rcx
            },
        };
        io_exit(io.port, IoDirection::Out, count as u32)
    }

    /// Where the next elements lie and how many can go at once, segment checks done.
    fn string_run(&self, io: &StringIo, want: Want) -> Result<(Gva, u64), Abort> {
        let size = u64::from(io.port.size);
        let gva = linear(self.state, io.segment, io.index, size, want)?;
        let count = io.run_length(gva);
        if linear(self.state, io.segment, io.index, size * count, want).is_ok() {
            Ok((gva, count))
        } else {
            Ok((gva, 1))
        }
    }
}

/// A 32-bit index clears the upper half, a 16-bit one leaves it.
fn put_index(old: u64, new: u64, mask: u64) -> u64 {
    if mask == 0xffff {
        merge(old, new, mask)
    } else {
        new & mask
    }
}

fn string_address_mask(kind: OpKind) -> u64 {
    match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 0xffff,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn io_exit(port: Port, direction: IoDirection, count: u32) -> Abort {
    Exit::Io(IoExit {
        port: port.number,
        size: port.size,
        direction,
        count,
    })
    .into()
}
