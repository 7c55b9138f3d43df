//! What accelerators this host has.
//!
//! `/dev/kvm` opens on machines where it is of no use: some hosts offer a *software* KVM, which
//! implements the API by emulating the guest in the kernel. [`kernel`] tells the two apart by
//! measuring, not by trusting one flag. [`user`] tries the few things that ours needs.

pub mod kernel;
mod timed;
pub mod user;

pub use kernel::{KernelKvm, KvmKind};
pub use user::{Need, UserSupport};
