//! Signals of the calling program during KVM's calls.
//!
//! In the kernel, a signal that arrives during a call waits until the call has ended, and ends
//! `KVM_RUN` with `EINTR`; the program's handler never finds KVM in the middle of something. In user
//! space the handler would run there, perhaps on top of guest code, on the vCPU's stack; it may call
//! KVM again, while a lock is held, or jump away. So:
//!
//! 1. The program's handlers are *adopted*: a trampoline is installed in their place, with the same
//!    mask and flags. Outside of KVM's calls it calls the program's handler and that is all.
//! 2. During a [`Call`] it defers: it queues the same signal again with the same `siginfo`, and
//!    returns with all signals blocked. In `KVM_RUN` (a [`Section`]) it also notes the signal with
//!    the vCPU, which leaves guest code at the next poll, or wakes from `HLT`.
//! 3. When the outermost call ends and nothing of ours is in progress, the mask is restored. The
//!    kernel delivers the queued signal there, to the trampoline, which now calls the program's
//!    handler; it may jump away, call KVM, or unwind the thread (`pthread_cancel` does).
//!
//! With `KVM_SET_SIGNAL_MASK`, the thread's mask is the given one during the section. A signal which
//! is blocked in the thread and not in the mask is then noted and stays pending: the program fetches
//! it with `sigwait`. It may well have no handler, so the trampoline is installed for those signals
//! whatever the program's disposition ([`unblocked_by`]), and stands for that disposition outside.
//!
//! Synchronous signals (`SIGSEGV`, `SIGBUS`, `SIGFPE`, `SIGILL`, `SIGTRAP`) are never deferred; they
//! belong to [`memory::access`] and to [`cpu::traps`], which hand on what is not theirs. Signals
//! whose disposition is the default end or stop the process as ever.
//!
//! Handlers that the program installs after its first `KVM_RUN` are adopted if it calls
//! [`sigaction`] here (the preload library's `sigaction` does), or at the next [`adopt`].
//!
//! | state of a thread    | depth | mask                | a signal is            |
//! |----------------------|-------|---------------------|------------------------|
//! | outside              | 0     | the program's       | handled at once        |
//! | in a call            | > 0   | the program's or KVM's | deferred            |
//! | in a call, noted     | > 0   | all but synchronous | pending in the kernel  |
#![expect(
    unsafe_code,
    reason = "signal handlers, and the program's own function pointers called by them"
)]

mod adopted;
mod mask;
mod thread;

pub(crate) use adopted::order;
pub use adopted::{adopt, adopt_cancellation, sigaction, unblocked_by};
pub(crate) use mask::Blocked;
pub use mask::{SignalSet, mask_from};
pub use thread::{Call, Ended, Interrupt, Section};
