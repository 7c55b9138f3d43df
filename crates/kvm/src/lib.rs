//! KVM in user space: VMs, vCPUs, interrupt controllers and clocks with the kernel's semantics.

mod paging;

pub use paging::PagingPath;
