//! KVM in user space: VMs, vCPUs, interrupt controllers and clocks with the kernel's semantics.

pub mod bus;
pub mod clock;
pub mod errno;
pub mod eventfd;
pub mod irqchip;
mod paging;
pub mod paravirt;
pub mod service;

pub use paging::PagingPath;
