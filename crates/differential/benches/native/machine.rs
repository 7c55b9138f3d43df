//! A guest in 64-bit mode at CPL 0, RAM mapped one to one, which calls a function and halts.

use addr::Gpa;
use anyhow::{Result, ensure};
use cpu::{Exit, Segment};
use differential::guest::machine::Machine;
use x86::control::{Cr0, Cr4, Efer};

const PML4: u64 = 0x1000;
const STACK_TOP: u64 = 0x1f000;
const HALT: u64 = 0x1f800;
/// Where kernels are put.
pub(crate) const CODE: u64 = 0x20_0000;
/// Where the buffer lies.
pub(crate) const BUFFER: u64 = 0x100_0000;
/// Bytes of RAM.
pub(crate) const RAM: u64 = 96 << 20;

/// The guest.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
}

impl Guest {
    pub(crate) fn new() -> Result<Self> {
        let machine = Machine::new(RAM)?;
        let put = |at: u64, value: u64| machine.write(Gpa::new(at), &value.to_le_bytes());
        put(PML4, 0x2003 | 0x60);
        put(0x2000, 0x3003 | 0x60);
        for page in 0..RAM >> 21 {
            put(0x3000 + page * 8, page << 21 | 0xe3);
        }
        machine.write(Gpa::new(HALT), &[0xf4]);
        Ok(Self { machine })
    }

    /// Calls `function(buffer, rounds)` and answers RAX.
    pub(crate) fn call(&mut self, function: u64, buffer: u64, rounds: u64) -> Result<u64> {
        let stack = STACK_TOP - 8;
        self.machine.write(Gpa::new(stack), &HALT.to_le_bytes());
        self.prepare();
        let state = self.machine.vcpu.state_mut();
        state.gpr[4] = stack;
        state.gpr[7] = buffer;
        state.gpr[6] = rounds;
        state.rip = function;
        let exit = self.machine.run();
        let state = self.machine.vcpu.state();
        ensure!(
            exit == Exit::Halt && state.rip == HALT + 1,
            "the guest left by {exit:?} at {:#x}",
            state.rip
        );
        Ok(state.gpr[0])
    }

    fn prepare(&mut self) {
        let state = self.machine.vcpu.state_mut();
        state.rflags = 2;
        state.cr0 = (Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG).bits();
        state.cr3 = PML4;
        state.cr4 = (Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE).bits();
        state.msrs.efer = (Efer::LME | Efer::LMA | Efer::NXE).bits();
        state.xcr0 = 7;
        let data = Segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 0x18,
            attributes: 0xc093,
            unusable: false,
        };
        let segments = &mut state.segments;
        segments.cs = Segment {
            selector: 0x10,
            attributes: 0xa09b,
            ..data
        };
        for segment in [
            &mut segments.ss,
            &mut segments.ds,
            &mut segments.es,
            &mut segments.fs,
            &mut segments.gs,
        ] {
            *segment = data;
        }
        segments.tr = Segment {
            attributes: 0x8b,
            limit: 0x67,
            ..data
        };
        segments.ldtr.unusable = true;
    }
}
