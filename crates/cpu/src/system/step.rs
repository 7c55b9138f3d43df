//! Running instructions one by one: single step, shadows, instruction breakpoints (SDM 3B, 19.3;
//! SDM 3A, 7.8.3).

use x86::debug::DR6_BS;
use x86::rflags;

use super::debug::{has_breakpoints, has_instruction_breakpoints};
use super::fault::debug;
use super::watch::has_data_breakpoints;
use super::{Abort, Context, Effects, GuestDebug, Pending};
use crate::CpuState;

/// What [`begin_instruction`] hands to [`end_instruction`].
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Whether TF was set, or the monitor steps.
    traps: bool,
    /// Data breakpoints that the instruction will meet.
    data: u64,
}

/// Whether the next instruction must run alone.
///
/// What it depends on changes only with [`Effects::DEBUG`], or outside of a run.
///
/// An `STI` shadow counts only while something waits for its end, or came after the `STI`: until then
/// [`Pending::lazy_shadow`] says where it ends.
pub fn must_step(state: &CpuState, pending: &Pending, guest_debug: &GuestDebug) -> bool {
    state.rflags & (rflags::TF | rflags::RF) != 0
        || state.events.sti_shadow && pending.lazy_shadow.is_none()
        || state.events.mov_ss_shadow
        || guest_debug.enabled && guest_debug.single_step
        || has_instruction_breakpoints(state, guest_debug)
        || has_data_breakpoints(state, guest_debug)
}

/// Takes RF out of RFLAGS where the next instruction needn't run alone for it; the instruction's RIP.
///
/// Every handler of a fault returns with RF set, and without breakpoints it shows in one place only:
/// the flags that an event pushes which comes before the instruction is over. So it is kept by where
/// it counts, and [`bring_rf_back`] puts it back for who looks. Where the instruction is part of a
/// loop the flags may have it once more than on a CPU, when an interrupt comes there; nothing follows
/// from that.
pub fn put_rf_aside(state: &mut CpuState, guest_debug: &GuestDebug) -> Option<u64> {
    let needed = guest_debug.enabled
        || state.rflags & rflags::TF != 0
        || has_breakpoints(state, guest_debug);
    if state.rflags & rflags::RF == 0 || needed {
        return None;
    }
    state.rflags &= !rflags::RF;
    Some(state.rip)
}

/// Undoes [`put_rf_aside`] if RIP is where it was: before anybody looks at RFLAGS.
pub fn bring_rf_back(state: &mut CpuState, resumes: Option<u64>) {
    if resumes == Some(state.rip) {
        state.rflags |= rflags::RF;
    }
}

/// Before an instruction that runs alone: instruction breakpoints.
///
/// [`Effects::SHADOW`], [`Effects::DELIVERED`] and [`Effects::RF_LOADED`] are cleared, so that [`end_instruction`] finds
/// what this instruction did.
pub fn begin_instruction(ctx: &mut Context<'_>) -> Result<Step, Abort> {
    ctx.effects -= Effects::SHADOW | Effects::DELIVERED | Effects::RF_LOADED;
    let state = &*ctx.state;
    if state.rflags & rflags::RF == 0 && !state.events.mov_ss_shadow {
        let bits = ctx.instruction_breakpoints();
        if bits != 0 {
            ctx.report_debug(bits)?;
            return Err(debug(bits));
        }
    }
    let traps =
        ctx.state.flags_have(rflags::TF) || ctx.guest_debug.enabled && ctx.guest_debug.single_step;
    let data = ctx.data_breakpoints_ahead();
    Ok(Step { traps, data })
}

/// After an instruction that ran alone to its end: shadows end, RF is cleared, traps become due.
/// [`super::boundary`] comes next and delivers them.
///
/// `ctx.effects` must be those of the instruction, if it was one for [`super::execute`].
pub fn end_instruction(ctx: &mut Context<'_>, step: Step) {
    let effects = ctx.effects;
    if !effects.contains(Effects::SHADOW) {
        ctx.state.events.sti_shadow = false;
        ctx.state.events.mov_ss_shadow = false;
    }
    // A load of SS takes its own single-step trap with it; watchpoints wait for the next instruction.
    let inhibited = effects.contains(Effects::SHADOW) && ctx.state.events.mov_ss_shadow;
    if step.traps && !effects.contains(Effects::DELIVERED) && !inhibited {
        ctx.pending.debug |= DR6_BS;
    }
    ctx.pending.debug |= step.data;
    if !effects.contains(Effects::RF_LOADED) {
        ctx.state.rflags &= !rflags::RF;
    }
    ctx.effects |= Effects::EVENTS | Effects::DEBUG;
}

/// Ends a lazy shadow that RIP has left. Before anybody else looks at the shadows.
pub fn settle_shadow(state: &mut CpuState, pending: &mut Pending) {
    if let Some(shadow) = pending.lazy_shadow
        && (shadow.rip != state.rip || !state.events.sti_shadow)
    {
        pending.lazy_shadow = None;
        state.events.sti_shadow = false;
    }
}

/// A look at events while a lazy shadow may last: the second one at its place makes it exact.
pub(super) fn look_at_shadow(state: &mut CpuState, pending: &mut Pending) -> Effects {
    settle_shadow(state, pending);
    match &mut pending.lazy_shadow {
        None => Effects::empty(),
        Some(shadow) if !shadow.seen => {
            shadow.seen = true;
            Effects::empty()
        }
        Some(_) => {
            pending.lazy_shadow = None;
            Effects::DEBUG
        }
    }
}
