//! Facts of the architecture: paging bits, control registers, error codes, MSRs, descriptors.
//!
//! Numbers and the shapes of structures only; what a CPU does with them is in `mmu` and `cpu`.

#![no_std]

pub mod control;
pub mod debug;
pub mod descriptor;
pub mod msr;
pub mod page_fault;
pub mod paging;
pub mod rflags;
pub mod tss;
pub mod vector;
pub mod xstate;
