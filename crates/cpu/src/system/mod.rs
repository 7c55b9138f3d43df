//! System instructions, exceptions and interrupts (SDM 3A; APM 2).
//!
//! What translated code can't do itself: the instructions that read or change the CPU's own state,
//! far transfers, and the delivery of events. Nothing here knows of translation; everything works on
//! a [`Context`]: the architectural state, memory by linear address, the machine around the CPU.
//!
//! ```text
//!   dispatcher ── boundary() ──────── interrupts, NMI, debug traps ─┐
//!       │                                                           ├─ deliver() ── IDT, stacks
//!       ├─ translated code ── Exception ────────────────────────────┤
//!       │        │                                                  │
//!       │        └── execute() ── Abort::Exception ─────────────────┘
//!       └─ begin_instruction() / end_instruction() when stepping
//! ```
//!
//! # The protocol
//!
//! All state is in [`crate::CpuState`] when anything here is called: general registers, RIP of the
//! instruction (its start), all of RFLAGS. [`Context::fpu`] need be up to date only where
//! [`fpu_use`] says so.
//!
//! * [`execute`] runs one instruction for which [`is_system`] holds. On `Ok` RIP is past it or where
//!   it leads; on `Err` the state is as before the instruction (but for what the architecture itself
//!   leaves half done: a string instruction between two elements, a task switch past its commit
//!   point). An [`Abort::Exception`] is then handed to [`deliver()`] by the caller.
//! * [`deliver()`] brings an event to the guest's handler. Faults during delivery become double
//!   faults, and those a shutdown, by themselves; what comes back is an exit or a host fault, and then
//!   the event waits in [`crate::CpuState::events`] to be delivered again.
//! * [`boundary`] is called between two instructions: on entry, when the request word says that an
//!   event may wait, and after [`Effects::EVENTS`].
//! * While [`must_step`] holds, instructions run one by one, each between [`begin_instruction`] and
//!   [`end_instruction`]. A faulting instruction is not ended; delivery takes its place.
//! * [`Effects`] collects what changed under the translator's feet; the caller clears it.

mod classify;
mod context;
mod control;
mod debug;
mod deliver;
mod dispatch;
mod events;
mod far;
mod fault;
mod flags;
mod gate;
mod io;
mod iret;
mod memory;
mod misc;
mod modes;
mod msr;
mod offer;
mod operand;
mod pending;
mod registers;
mod segment;
mod stack;
mod step;
mod syscall;
mod table;
mod tables;
mod task;
#[cfg(test)]
mod tests;
mod watch;
mod x87;
mod xsave;

pub use classify::{FpuUse, asks_platform, fpu_use, is_system};
pub use context::{Context, Effects, GuestDebug, LazyShadow, Next, Pending};
pub use deliver::{Event, deliver};
pub use dispatch::execute;
pub use events::{Boundary, boundary};
pub use memory::{Flush, LinearMemory, Privilege};
pub use modes::Mode;
pub use offer::{Instructions, Offer, Vendor};
pub use pending::{Completion, PendingExit, complete_hypercall, complete_io, complete_msr};
pub use step::{
    Step, begin_instruction, bring_rf_back, end_instruction, must_step, put_rf_aside, settle_shadow,
};
pub(crate) use syscall::{SYSRET_FLAGS, syscall_segments};

use crate::{Exception, Exit, HostFault};

/// Why an instruction or a delivery didn't run to its end.
///
/// The three outcomes of [`crate::outcome`] in one type, only so that `?` carries them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Abort {
    /// The guest gets an exception.
    Exception(Exception),
    /// The monitor must act first.
    Exit(Exit),
    /// The host can't provide the memory.
    HostFault(HostFault),
}

impl From<Exception> for Abort {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

impl From<Exit> for Abort {
    fn from(exit: Exit) -> Self {
        Self::Exit(exit)
    }
}
