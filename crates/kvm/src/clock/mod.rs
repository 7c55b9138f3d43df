//! Clocks: the guest's TSC, kvmclock and wall clock, steal time, and the arithmetic under them.

pub mod scale;
pub mod time;

pub use time::{host_tsc, monotonic_ns};
