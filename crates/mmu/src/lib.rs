//! The guest page-table walker and the nested, shadow and direct paths to the host's page.

mod access;
pub mod event;
mod fill;
mod listener;
mod mmu;
mod nested;
mod registers;
mod reserved;
mod rights;
mod shadow;
mod slot_tables;
pub mod stats;
mod vcpu;
pub mod walker;
mod working_set;

pub use access::{Access, AccessKind, Fault, HostFault, PageFault, Privilege, Translation};
pub use mmu::{Mmu, MmuConfig, PagingPath};
pub use nested::SecondLevelEntry;
pub use registers::{GigabytePages, PagingFeatures, PagingRegisters, Regime, Vendor};
pub use rights::Rights;
pub use vcpu::{Probe, TlbEffect, VcpuMmu};
