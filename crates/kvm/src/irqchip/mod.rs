//! Interrupt controllers "in the kernel".
//!
//! Each is a pure state machine: [`apic`] (one local APIC a vCPU), [`ioapic`], [`pic`] (the two
//! 8259s) and [`pit`]. [`controllers`] wires them together, [`delivery`] finds the targets of a
//! message, [`routing`] says what a GSI means, and [`wake`] is the seam to the vCPUs' threads.

pub mod apic;
pub mod chip;
pub mod controllers;
pub mod delivery;
pub mod devices;
pub mod ioapic;
pub mod lines;
mod map;
pub mod message;
pub mod pic;
pub mod pit;
pub mod policy;
pub mod routing;
pub mod wake;
