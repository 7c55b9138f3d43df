//! `RDMSR` and `WRMSR` of the CPU's own registers (SDM 4; APM 2, 3.1.7 and 6.1), and the
//! instructions that are shorthand for some of them.

use iced_x86::{Instruction, Mnemonic};
use x86::control::{Cr0, Cr4, Efer};
use x86::msr;

use super::fault::{general, undefined};
use super::offer::Instructions;
use super::{Abort, Context, Effects, Next, PendingExit};
use crate::platform::Refusal;
use crate::state::gpr;
use crate::{CpuState, Exit};

/// The time-stamp counter of the host.
#[expect(
    unsafe_code,
    reason = "RDTSC is an intrinsic that the library marks unsafe"
)]
fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user mode run it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The guest's time-stamp counter.
pub(super) fn guest_tsc(state: &CpuState) -> u64 {
    let host = host_tsc();
    let scaled = match state.tsc_ratio {
        0 => host,
        ratio => ((u128::from(host) * u128::from(ratio)) >> 32) as u64,
    };
    scaled.wrapping_add(state.tsc_offset)
}

/// Why an MSR that the platform refuses goes up, or becomes a fault.
fn refused(refusal: Refusal) -> Abort {
    match refusal {
        Refusal::Exception(exception) => Abort::Exception(exception),
        Refusal::Exit(exit) => Abort::Exit(exit),
    }
}

impl Context<'_> {
    /// `RDMSR`.
    pub(super) fn rdmsr(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let index = self.state.gpr[gpr::RCX] as u32;
        let allowed = self.platform.filter_msr(index, None);
        let value = match (allowed, self.own_msr(index)) {
            (Err(refusal), _) => return Err(self.left_for_read(refusal, next)),
            (Ok(()), Some(value)) => value,
            (Ok(()), None) => self.platform_read_msr(index, next)?,
        };
        self.state.set_edx_eax(value);
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `WRMSR`.
    pub(super) fn wrmsr(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let index = self.state.gpr[gpr::RCX] as u32;
        let value = self.state.edx_eax();
        if let Err(refusal) = self.platform.filter_msr(index, Some(value)) {
            return Err(self.left_for_write(refusal, next));
        }
        self.write_msr(index, value, next)?;
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// The value of an MSR that is the CPU's own.
    fn own_msr(&self, index: u32) -> Option<u64> {
        let state = &*self.state;
        Some(match index {
            msr::TSC => guest_tsc(state),
            msr::EFER => state.msrs.efer,
            msr::STAR => state.msrs.star,
            msr::LSTAR => state.msrs.lstar,
            msr::CSTAR => state.msrs.cstar,
            msr::SFMASK => state.msrs.sfmask,
            msr::FS_BASE => state.segments.fs.base,
            msr::GS_BASE => state.segments.gs.base,
            msr::KERNEL_GS_BASE => state.msrs.kernel_gs_base,
            msr::SYSENTER_CS => state.msrs.sysenter_cs,
            msr::SYSENTER_ESP => state.msrs.sysenter_esp,
            msr::SYSENTER_EIP => state.msrs.sysenter_eip,
            msr::PAT => state.msrs.pat,
            msr::TSC_AUX => state.msrs.tsc_aux,
            msr::XSS if self.offer.instructions.contains(Instructions::XSAVES) => state.msrs.xss,
            _ => return None,
        })
    }

    fn platform_read_msr(&mut self, index: u32, next: u64) -> Result<u64, Abort> {
        let value = self.platform.read_msr(self.state, index);
        value.map_err(|refusal| self.left_for_read(refusal, next))
    }

    /// A refused `RDMSR`; where the monitor answers, the answer completes it.
    fn left_for_read(&mut self, refusal: Refusal, next: u64) -> Abort {
        let rip = self.state.rip;
        if let Refusal::Exit(Exit::Msr(_)) = refusal {
            self.pending.exit = PendingExit::ReadMsr { rip, next };
        }
        refused(refusal)
    }

    /// A refused `WRMSR`, likewise.
    fn left_for_write(&mut self, refusal: Refusal, next: u64) -> Abort {
        let rip = self.state.rip;
        if let Refusal::Exit(Exit::Msr(_)) = refusal {
            self.pending.exit = PendingExit::WriteMsr { rip, next };
        }
        refused(refusal)
    }

    fn write_msr(&mut self, index: u32, value: u64, next: u64) -> Result<(), Abort> {
        match index {
            msr::FS_BASE
            | msr::GS_BASE
            | msr::KERNEL_GS_BASE
            | msr::LSTAR
            | msr::CSTAR
            | msr::SYSENTER_ESP
            | msr::SYSENTER_EIP => self.write_address_msr(index, value),
            msr::EFER => self.write_efer(value),
            msr::STAR => Self::put(&mut self.state.msrs.star, value),
            msr::SFMASK => Self::put(&mut self.state.msrs.sfmask, value),
            msr::SYSENTER_CS => Self::put(&mut self.state.msrs.sysenter_cs, value & 0xffff_ffff),
            msr::PAT if x86::msr::pat_is_valid(value) => Self::put(&mut self.state.msrs.pat, value),
            msr::TSC_AUX if value >> 32 == 0 => Self::put(&mut self.state.msrs.tsc_aux, value),
            // No supervisor component is offered.
            msr::XSS if value == 0 => Self::put(&mut self.state.msrs.xss, value),
            msr::PAT | msr::TSC_AUX | msr::XSS => Err(general()),
            _ => self.platform_write_msr(index, value, next),
        }
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "an arm of a match whose other arms fail"
    )]
    fn put(register: &mut u64, value: u64) -> Result<(), Abort> {
        *register = value;
        Ok(())
    }

    /// MSRs that hold a linear address. Those of `SYSENTER` are made canonical rather than refused,
    /// as the kernel's KVM does: AMD's keep 32 bits, Intel's fault.
    fn write_address_msr(&mut self, index: u32, value: u64) -> Result<(), Abort> {
        let sysenter = matches!(index, msr::SYSENTER_ESP | msr::SYSENTER_EIP);
        if !sysenter && !self.state.is_canonical(value) {
            return Err(general());
        }
        let value = if sysenter {
            self.state.sign_extended(value)
        } else {
            value
        };
        let state = &mut *self.state;
        match index {
            msr::FS_BASE => state.segments.fs.base = value,
            msr::GS_BASE => state.segments.gs.base = value,
            msr::KERNEL_GS_BASE => state.msrs.kernel_gs_base = value,
            msr::LSTAR => state.msrs.lstar = value,
            msr::CSTAR => state.msrs.cstar = value,
            msr::SYSENTER_ESP => state.msrs.sysenter_esp = value,
            _ => state.msrs.sysenter_eip = value,
        }
        if matches!(index, msr::FS_BASE | msr::GS_BASE) {
            self.effects |= Effects::SEGMENTS;
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Abort> {
        let old = self.state.msrs.efer;
        let lme_changes = (old ^ value) & Efer::LME.bits() != 0;
        if value & !self.offer.efer & !Efer::LMA.bits() != 0
            || lme_changes && self.state.cr0_has(Cr0::PG)
        {
            return Err(general());
        }
        self.state.msrs.efer = value & !Efer::LMA.bits() | old & Efer::LMA.bits();
        self.effects |= Effects::PAGING;
        self.memory.paging_changed(self.state);
        Ok(())
    }

    fn platform_write_msr(&mut self, index: u32, value: u64, next: u64) -> Result<(), Abort> {
        self.effects |= Effects::EVENTS;
        let written = self.platform.write_msr(self.state, index, value);
        written.map_err(|refusal| self.left_for_write(refusal, next))
    }

    /// `RDTSC`, `RDTSCP`.
    pub(super) fn rdtsc(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let with_aux = instruction.mnemonic() == Mnemonic::Rdtscp;
        if with_aux && !self.offer.instructions.contains(Instructions::RDTSCP) {
            return Err(undefined());
        }
        if self.state.cr4_has(Cr4::TSD) && self.state.cpl() > 0 {
            return Err(general());
        }
        self.state.rip = self.next_rip(instruction);
        self.state.set_edx_eax(guest_tsc(self.state));
        if with_aux {
            self.state.gpr[gpr::RCX] = self.state.msrs.tsc_aux & 0xffff_ffff;
        }
        Ok(Next::Sequential)
    }

    /// `RDPID`.
    pub(super) fn rdpid(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.offer.instructions.contains(Instructions::RDPID) {
            return Err(undefined());
        }
        self.state.rip = self.next_rip(instruction);
        self.state
            .set_register(instruction.op0_register(), self.state.msrs.tsc_aux);
        Ok(Next::Sequential)
    }

    /// `SWAPGS`.
    pub(super) fn swapgs(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.is_64bit() {
            return Err(undefined());
        }
        self.require_cpl0()?;
        self.state.rip = self.next_rip(instruction);
        let state = &mut *self.state;
        std::mem::swap(&mut state.segments.gs.base, &mut state.msrs.kernel_gs_base);
        self.effects |= Effects::SEGMENTS;
        Ok(Next::Sequential)
    }

    /// `RDFSBASE`, `RDGSBASE`, `WRFSBASE`, `WRGSBASE`.
    pub(super) fn segment_base(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.is_64bit() || !self.state.cr4_has(Cr4::FSGSBASE) {
            return Err(undefined());
        }
        let register = instruction.op0_register();
        let value = self.state.register(register);
        let state = &mut *self.state;
        let mnemonic = instruction.mnemonic();
        let base = match mnemonic {
            Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => state.segments.fs.base,
            _ => state.segments.gs.base,
        };
        match mnemonic {
            Mnemonic::Rdfsbase | Mnemonic::Rdgsbase => state.set_register(register, base),
            _ if !state.is_canonical(value) => return Err(general()),
            Mnemonic::Wrfsbase => state.segments.fs.base = value,
            _ => state.segments.gs.base = value,
        }
        if matches!(mnemonic, Mnemonic::Wrfsbase | Mnemonic::Wrgsbase) {
            self.effects |= Effects::SEGMENTS;
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }
}

impl CpuState {
    /// EDX:EAX.
    pub(super) fn edx_eax(&self) -> u64 {
        self.gpr[gpr::RDX] << 32 | self.gpr[gpr::RAX] & 0xffff_ffff
    }

    /// Sets EDX:EAX; the upper halves become zero.
    pub(super) fn set_edx_eax(&mut self, value: u64) {
        self.gpr[gpr::RAX] = value & 0xffff_ffff;
        self.gpr[gpr::RDX] = value >> 32;
    }
}
