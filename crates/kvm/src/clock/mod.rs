//! Clocks: the guest's TSC, kvmclock and wall clock, steal time, and the arithmetic under them.

pub mod kvmclock;
pub mod memory;
pub mod scale;
pub mod steal;
pub mod time;

pub use time::{host_tsc, monotonic_ns};
