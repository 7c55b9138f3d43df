//! The side under test: the same bytes at CPL 3 of a long-mode guest.

mod cpu;
pub mod image;
pub mod machine;
mod quiet;
pub mod thread_time;
pub mod watchdog;

pub use cpu::{GuestCpu, Translation};
pub use watchdog::Watchdog;
