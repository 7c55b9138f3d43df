//! Guest RAM, memory slots, the guest physical address space, and the host's page tables read from
//! outside.
//!
//! | module      | what it holds                                                                  |
//! |-------------|--------------------------------------------------------------------------------|
//! | [`ram`]     | memory that the monitor allocates for a guest: anonymous, memfd, hugetlb, file |
//! | [`access`]  | loads and stores at an [`addr::Hva`] that survive a fault of the host          |
//! | [`slot`]    | KVM's memory slots: which guest frame lies at which host address               |
//! | [`space`]   | the guest physical address space: what lies where; `map()` and `unmap()`       |
//! | [`ahead`]   | pages in front of a guest that writes to one after another                     |
//! | [`pagemap`] | the host's page tables: from a host virtual address to the page frame             |
//! | [`dirty`]   | dirty bitmaps and dirty rings                                                  |
//! | [`quiesce`] | how a writer waits until no vCPU can hold what it has replaced                 |
//! | [`sync`]    | locks, as tests of threads want them                                           |

pub mod access;
pub mod ahead;
pub mod chain;
pub mod dirty;
pub mod pagemap;
pub mod quiesce;
pub mod ram;
pub mod slot;
pub mod space;
pub mod sync;

#[cfg(all(test, loom))]
mod models;
