//! Which pages were written: a bitmap per slot, and a ring per vCPU (`api.rst`, sections
//! `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG` and `KVM_CAP_DIRTY_LOG_RING`).
//!
//! These are the containers. When a page is marked, and how a write is noticed at all, is the MMU's.

mod bitmap;
mod ring;

pub use bitmap::{DirtyBitmap, DirtyWord, NoMemory};
pub use ring::{DirtyGfn, DirtyRing, Pushed, RESERVED_ENTRIES, RingError};
