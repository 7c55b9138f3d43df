//! The second level: guest physical frame to host virtual frame, what NPT and EPT are to kvm.ko.
//!
//! A radix tree of atomic entries. Readers and faults take no lock; several vCPUs fill it in
//! parallel, each install is one compare-and-exchange. It leads to host *virtual* addresses, so
//! nothing in it depends on where the host keeps a page, and a page of 2 MiB or 1 GiB needs only a
//! memslot that covers it: the host's side is contiguous by nature.
//!
//! ```text
//!  gfn  [ root index | 9 bits | 9 bits ]
//!            |           |        |
//!         root (1 GiB each)       |
//!            +-> table (2 MiB each)
//!                        +-> table (4 KiB each) -> host frame
//! ```
//!
//! The states of an entry are in [`entry`], the rules as a checker in [`invariants`].

mod change;
mod entry;
mod invariants;
mod pool;
mod table;

pub(crate) use change::Frames;
pub(crate) use entry::{Writes, size_of};
pub(crate) use pool::TableRef;
pub use table::SecondLevelEntry;
pub(crate) use table::{Install, Outcome, SecondLevel, Spare};
