//! Every instruction and event on a machine of arrays: a flat megabyte, a platform that records.

mod control;
mod debug;
mod events;
mod far;
mod flags;
mod io;
mod machine;
mod msr;
mod segment;
mod syscall;
mod task;
mod xsave;

use machine::{Machine, general, page_fault};
