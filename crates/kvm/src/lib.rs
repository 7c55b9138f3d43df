//! KVM in user space: VMs, vCPUs, interrupt controllers and clocks with the kernel's semantics.

pub mod clock;
pub mod errno;
pub mod irqchip;
mod paging;

pub use paging::PagingPath;
