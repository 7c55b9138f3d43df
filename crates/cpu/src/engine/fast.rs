//! What the frame tells system instructions that run inline (see `translate::inline`).

use x86::control::{Cr4, Efer};
use x86::rflags;

use super::frame::{Fast, NO_MODE, View};
use super::vcpu::Vcpu;
use crate::CpuState;
use crate::system::{Instructions, LazyShadow, Offer, SYSRET_FLAGS, syscall_segments};

/// A field that forbids.
fn unless(allowed: bool) -> u32 {
    u32::from(!allowed)
}

/// Works out what depends on the state and on CPUID.
fn refresh(fast: &mut Fast, state: &CpuState, offer: &Offer) {
    let cr4 = |bit: Cr4| state.cr4 & bit.bits() != 0;
    let tscp = offer.instructions.contains(Instructions::RDTSCP);
    let smap = cr4(Cr4::SMAP);
    let keeps = rflags::ALL & !state.msrs.sfmask & !rflags::RF;
    let enabled =
        state.msrs.efer & (Efer::SCE | Efer::LMA).bits() == (Efer::SCE | Efer::LMA).bits();
    // A counter that is scaled is multiplied in Rust.
    let tsc = state.tsc_ratio == 0;
    let user_tsc = tsc && !cr4(Cr4::TSD);
    fast.no_tsc = [unless(user_tsc), unless(tsc)];
    fast.no_tscp = [unless(user_tsc && tscp), unless(tsc && tscp)];
    fast.no_fsgsbase = unless(cr4(Cr4::FSGSBASE));
    fast.no_smap = unless(offer.instructions.contains(Instructions::SMAP));
    // A handler that keeps AC would run with other rights than the tables say.
    fast.no_syscall = unless(enabled && keeps & rflags::AC == 0);
    fast.syscall_keeps = keeps;
    fast.sysret_takes = SYSRET_FLAGS;
    fast.trap_flag = rflags::TF;
    (fast.kernel, fast.user) = syscall_segments(state.msrs.star);
    if !smap {
        fast.modes[View::SupervisorAcSet as usize] = NO_MODE;
    }
}

impl Vcpu {
    /// After a change of MSRs or control registers.
    pub(super) fn refresh_fast(&mut self) {
        let offer = self.offer;
        let frame = self.frame_mut();
        refresh(&mut frame.fast, &frame.state, &offer);
    }

    /// Takes over what inline instructions have left: an `STI` shadow, where RIP is still behind the
    /// `STI`. A look at events comes now, so the shadow counts.
    pub(super) fn take_shadow(&mut self) {
        let frame = self.frame_mut();
        let rip = std::mem::take(&mut frame.fast.sti_rip);
        if rip != 0 && rip == frame.state.rip {
            frame.state.events.sti_shadow = true;
            self.pending.lazy_shadow = Some(LazyShadow { rip, seen: true });
        }
    }

    /// Something may have made an event pending without a kick.
    pub(super) fn suspect_events(&mut self) {
        self.frame_mut().fast.waits = 1;
    }
}
