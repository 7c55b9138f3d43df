//! The oracle: a child process in which the physical CPU runs the bytes.
//!
//! ```text
//!   parent                          child
//!   NativeCpu::run                  signal handler                 test code
//!     batch -> mailbox
//!     turn = CHILD  ── futex ──▶    load case into ucontext
//!                                   return (rt_sigreturn) ──────▶  runs ... INT3, or a fault
//!                                   outcome from ucontext ◀──────  signal
//!                                   next case ...
//!     outcomes      ◀── futex ──    turn = PARENT
//! ```
//!
//! The child lives in its signal handler. Delivering a signal is how the kernel hands over a
//! complete register state with vector, error code and CR2, and `rt_sigreturn` is how it loads one;
//! so there is no trampoline that could get a register wrong, and one signal costs a few
//! microseconds. A timer ends code that doesn't end; seccomp answers system calls with `SIGSYS`.

mod child;
mod local;
mod mailbox;
mod process;

pub use process::NativeCpu;
