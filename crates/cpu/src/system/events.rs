//! Delivery of exceptions and interrupts, and their order at an instruction boundary.

use super::{Abort, Context};
use crate::Exception;

/// What is brought to the guest's handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception.
    Exception(Exception),
    /// An interrupt from a controller.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// `INT n`, re-injected by the monitor; `next_rip` is already in RIP.
    SoftwareInterrupt(u8),
}

/// What [`boundary`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Nothing to deliver.
    Continue,
    /// RIP is at a handler.
    Delivered,
}

/// Brings an event to the guest's handler.
///
/// Faults on the way become double faults, and those a shutdown. On `Err`, which is an exit or a
/// host fault, never an exception, the event waits in [`crate::CpuState::events`].
pub fn deliver(ctx: &mut Context<'_>, event: Event) -> Result<(), Abort> {
    let _ = (ctx, event);
    Err(crate::Exit::Shutdown.into())
}

/// Looks between two instructions for what must be delivered, and delivers it.
pub fn boundary(ctx: &mut Context<'_>) -> Result<Boundary, Abort> {
    let _ = ctx;
    Ok(Boundary::Continue)
}
