//! One answer for one address: which way it goes, through which tables, and why.
//!
//! A [`Chain`] is the whole way of an address, read without changing anything:
//!
//! ```text
//! GVA --guest's tables--> GPA --memslot--> HVA --host's page tables--> HPA
//!      [`GuestSide`]            [`SlotSide`]      [`HostSide`]
//!                               [`SecondLevel`]: what stands there already for GPA to HVA
//! ```
//!
//! It reads the layers below and changes nothing: no A or D bit, no entry, no counter. What it
//! reads from is [`Evidence`]: registers, slots, and the monitor's memory, which may be this
//! process's or another's.

mod backwards;
mod chain;
mod decode;
mod explain;
pub mod faults;
mod hex;
mod host;
pub mod map;
pub mod qemu;
mod question;
mod second_level;
pub mod symbols;
mod text;
mod view;
mod walk;

pub use backwards::{Backwards, GuestMapping};
pub use chain::{
    Chain, GuestEntry, GuestSide, PagingSide, SecondLevel, SlotSide, TableEntry, TlbSide, VcpuSide,
};
pub use decode::{describe_access, error_code_words, mode_name, pte_flags};
pub use explain::{Evidence, Question, Search, explain, explain_own, path_name};
pub use hex::parse as parse_hex;
pub use host::HostSide;
pub use question::{NoAddress, Target};
pub use second_level::Tables;
pub use view::{GuestView, HostBytes, OwnBytes, SlotRange};
