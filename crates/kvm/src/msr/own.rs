//! The registers whose effect is the CPU's own, as the monitor reads and writes them.

use cpu::CpuState;
use x86::control::Efer;
use x86::msr as n;

use super::{Refused, Writer};
use crate::vcpu::{EFER_KNOWN, Machine, efer_is_valid};

/// Whether the number is one of theirs.
pub(super) fn owns(index: u32) -> bool {
    matches!(
        index,
        n::SYSENTER_CS
            | n::SYSENTER_ESP
            | n::SYSENTER_EIP
            | n::PAT
            | n::XSS
            | n::EFER
            | n::STAR
            | n::LSTAR
            | n::CSTAR
            | n::SFMASK
            | n::FS_BASE
            | n::GS_BASE
            | n::KERNEL_GS_BASE
            | n::TSC_AUX
    )
}

/// The value, or `None` where the register is not one of these.
pub(super) fn read(state: &CpuState, index: u32) -> Option<u64> {
    let msrs = &state.msrs;
    Some(match index {
        n::SYSENTER_CS => msrs.sysenter_cs,
        n::SYSENTER_ESP => msrs.sysenter_esp,
        n::SYSENTER_EIP => msrs.sysenter_eip,
        n::PAT => msrs.pat,
        n::XSS => msrs.xss,
        n::EFER => msrs.efer,
        n::STAR => msrs.star,
        n::LSTAR => msrs.lstar,
        n::CSTAR => msrs.cstar,
        n::SFMASK => msrs.sfmask,
        n::FS_BASE => state.segments.fs.base,
        n::GS_BASE => state.segments.gs.base,
        n::KERNEL_GS_BASE => msrs.kernel_gs_base,
        n::TSC_AUX => msrs.tsc_aux,
        _ => return None,
    })
}

fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

fn canonical(address: u64) -> Result<u64, Refused> {
    if is_canonical(address) {
        Ok(address)
    } else {
        Err(Refused::Invalid)
    }
}

/// EFER; LMA follows CR0.PG and LME, and is not written.
fn efer(state: &CpuState, machine: &Machine, value: u64, writer: Writer) -> Result<u64, Refused> {
    let lma = Efer::LMA.bits();
    let old = state.msrs.efer;
    let paging = state.cr0 & x86::control::Cr0::PG.bits() != 0;
    let lme_changes = (old ^ value) & Efer::LME.bits() != 0;
    let refused_to_guest = !efer_is_valid(value, &machine.cpuid) || paging && lme_changes;
    if value & !EFER_KNOWN != 0 || writer == Writer::Guest && refused_to_guest {
        return Err(Refused::Invalid);
    }
    Ok(value & !lma | old & lma)
}

/// Writes one of these registers.
pub(super) fn write(
    state: &mut CpuState,
    machine: &Machine,
    index: u32,
    value: u64,
    writer: Writer,
) -> Result<(), Refused> {
    let checked = match index {
        n::FS_BASE | n::GS_BASE | n::KERNEL_GS_BASE | n::LSTAR | n::CSTAR => canonical(value)?,
        // AMD ignores the upper half, Intel faults; a canonical value suits both.
        n::SYSENTER_ESP | n::SYSENTER_EIP => ((value as i64) << 16 >> 16) as u64,
        n::PAT if !n::pat_is_valid(value) => return Err(Refused::Invalid),
        n::XSS if value != 0 => return Err(Refused::Invalid),
        n::TSC_AUX if machine.cpuid.is_amd() => value & 0xffff_ffff,
        n::TSC_AUX if value >> 32 != 0 => return Err(Refused::Invalid),
        n::EFER => efer(state, machine, value, writer)?,
        _ => value,
    };
    store(state, index, checked);
    Ok(())
}

fn store(state: &mut CpuState, index: u32, value: u64) {
    let msrs = &mut state.msrs;
    let register = match index {
        n::SYSENTER_CS => &mut msrs.sysenter_cs,
        n::SYSENTER_ESP => &mut msrs.sysenter_esp,
        n::SYSENTER_EIP => &mut msrs.sysenter_eip,
        n::PAT => &mut msrs.pat,
        n::XSS => &mut msrs.xss,
        n::EFER => &mut msrs.efer,
        n::STAR => &mut msrs.star,
        n::LSTAR => &mut msrs.lstar,
        n::CSTAR => &mut msrs.cstar,
        n::SFMASK => &mut msrs.sfmask,
        n::FS_BASE => &mut state.segments.fs.base,
        n::GS_BASE => &mut state.segments.gs.base,
        n::KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
        _ => &mut msrs.tsc_aux,
    };
    *register = value;
}
