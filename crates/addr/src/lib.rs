//! The four address spaces as types.
//!
//! | type    | space          | who uses it                                             |
//! |---------|----------------|---------------------------------------------------------|
//! | [`Gva`] | guest virtual  | the guest's instructions                                |
//! | [`Gpa`] | guest physical | the guest's page tables, its devices, the memory slots  |
//! | [`Hva`] | host virtual   | the monitor's process, which holds the guest's RAM      |
//! | [`Hpa`] | host physical  | the page frame that the host machine really uses        |
//!
//! There is no conversion between the spaces: going from one to the next is what the crates above
//! do, with tables that can say no. Arithmetic that can leave the space is `checked_`; where the
//! architecture wraps, the method says `wrapping_`.

#![no_std]

mod page;
mod range;
mod space;

pub use page::PageSize;
pub use range::Range;
pub use space::{Address, Frame, Gfn, Gpa, Gva, Gvn, Hfn, Hpa, Hva, Pfn};

/// A range of guest physical addresses.
pub type GpaRange = Range<Gpa>;
/// A range of host virtual addresses.
pub type HvaRange = Range<Hva>;
