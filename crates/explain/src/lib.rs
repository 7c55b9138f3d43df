//! One answer for one address: which way it goes, through which tables, and why.
//!
//! A [`Chain`] is the whole way of a guest virtual address, read without changing anything:
//!
//! ```text
//! GVA --guest's tables--> GPA --memslot--> HVA --host's page tables--> HPA
//!      [`GuestSide`]            [`SlotSide`]      [`HostSide`]
//!                               [`SecondLevelSide`]: what stands there already for GPA to HVA
//! ```
//!
//! It reads the layers below and changes nothing: no A or D bit, no entry, no counter.

mod chain;
mod decode;
mod hex;
mod host;
mod text;

pub use chain::{Chain, GuestEntry, GuestSide, Question, SecondLevelSide, SlotSide, explain};
pub use decode::{describe_access, error_code_words, mode_name, pte_flags};
pub use host::HostSide;
