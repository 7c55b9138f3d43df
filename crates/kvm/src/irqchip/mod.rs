//! Interrupt controllers "in the kernel".

pub mod apic;
pub mod message;
pub mod policy;
pub mod wake;
