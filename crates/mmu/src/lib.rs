//! The guest page-table walker and the nested, shadow and direct paths to the host's page.

mod access;
mod registers;
mod reserved;
mod rights;
pub mod walker;

pub use access::{Access, AccessKind, Fault, HostFault, PageFault, Privilege, Translation};
pub use registers::{GigabytePages, PagingFeatures, PagingRegisters, Regime, Vendor};
pub use rights::Rights;
