//! From a guest's address to the host's page: the guest page-table walker and three paths behind it.
//!
//! ```text
//!   CPU: TLB miss
//!        |  VcpuMmu::translate(gva, access)
//!        v
//!   shadow ------ hit: both steps in one look-up ---------------------> Translation
//!        | miss                                                             ^
//!        v                                                                  |
//!   walker: the guest's tables, GVA -> GPA, sets A and D                    |
//!        |                                                                  |
//!        +-- nested: second level, GPA -> HVA -- hit -----------------------+
//!        |        | miss: nested fault                                      |
//!        |        v                                                         |
//!        +-- direct: memslots, GPA -> HVA -- (nested, shadow: install) -----+
//! ```
//!
//! One [`Mmu`] belongs to a VM, one [`VcpuMmu`] to each vCPU. [`MmuConfig`] says which path; a guest
//! can't tell them apart.
//!
//! # Who may call when
//! [`VcpuMmu::translate`] runs in the vCPU's thread in guest mode, that is inside
//! [`memory::quiesce`]. What it returns may be kept in a TLB until the vCPU's next checkpoint that
//! asks for `FLUSH_TLB`. The methods that change registers or invalidate return a [`TlbEffect`],
//! which the CPU obeys before the next instruction. [`VcpuMmu::probe`] may be called at any time.
//!
//! # How a translation is taken away
//! Whoever takes one away (a slot that changes, a dirty log that is harvested, shadow tables that
//! are protected) first changes the table that would answer the next miss, then makes every vCPU
//! drop its TLB and waits until each has passed a checkpoint. Only then is memory of tables used
//! again. Readers take no lock at any time.
//!
//! # Invariants
//! The legal states of entries and the rules between tables are written down, as prose, as a table
//! and as a checker ([`Mmu::check_invariants`]), with the second level and with the shadow tables.

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
mod totals;
mod vcpu;
pub mod walker;
mod working_set;

pub use access::{Access, AccessKind, Fault, HostFault, PageFault, Privilege, Translation};
pub use mmu::{LargePages, Mmu, MmuConfig, PagingPath};
pub use nested::SecondLevelEntry;
pub use registers::{GigabytePages, PagingFeatures, PagingRegisters, Regime, Vendor};
pub use rights::Rights;
pub use shadow::ShadowEntry;
pub use totals::totals;
pub use vcpu::{Probe, TlbEffect, VcpuMmu};
