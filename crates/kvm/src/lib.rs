//! KVM in user space: VMs, vCPUs, interrupt controllers and clocks with the kernel's semantics.
//!
//! ```text
//!   ioctl(fd, nr, arg) ── fds ── table ── raw ──┐ copies arguments in and out
//!                                               ▼
//!   Rust callers ─────────────────────► System, Vm, Vcpu ── cpu, mmu, memory
//!                                               │
//!                                        irqchip, clock
//! ```
//!
//! Semantics are those of the kernel's `Documentation/virt/kvm/api.rst` and of kvm.ko of Linux 6.12,
//! errno for errno. The [`table`] lists every ioctl and capability, and what is not there.

pub mod argument;
pub mod bus;
pub mod clock;
pub mod cpuid;
pub mod device;
pub mod errno;
pub mod eventfd;
pub mod fds;
pub mod guest_memory;
pub mod irqchip;
pub mod msr;
pub mod paravirt;
mod raw;
pub mod service;
pub mod signals;
mod stats;
mod system;
pub mod table;
pub mod turns;
pub mod vcpu;
pub mod vm;

pub use argument::Argument;
pub use cpu::BlockLength;
pub use errno::Errno;
pub use mmu::{LargePages, PagingPath, totals};
pub use system::{Settings, System};
pub use vcpu::Vcpu;
pub use vm::{Hold, StillRuns, Vm};
