//! The engine: translated code, where it is kept, how it is entered and left, and the loop around it.

pub(crate) mod blocks;
mod bounce;
mod cache;
mod code_map;
mod context;
mod count;
mod enter;
mod fast;
mod filled;
mod find;
pub(crate) mod frame;
mod inspect;
mod jumps;
mod kick;
mod large;
mod masked;
mod memory;
mod mmio;
mod run;
mod rust;
mod segments;
mod signals;
mod sites;
mod spans;
mod strings;
mod tlb;
#[cfg(test)]
mod tlb_model;
mod vcpu;
mod x87;

pub use code_map::CodeMap;
pub(crate) use enter::host_mxcsr_mask;
pub use inspect::{TlbEntry, Translation};
pub use kick::VcpuKick;
pub use signals::{previous, replace_previous};
pub use vcpu::{BlockLength, Vcpu, VcpuConfig};
