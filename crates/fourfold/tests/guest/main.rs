//! Whole guests under strain. A few seconds of it run with every `cargo test`; the rest is ignored
//! there and run by `cargo xtask guest-tests`.

mod boots;
mod disk;
mod host;
mod kernels;
mod memtest;
mod power_cut;
mod programs;
mod qemu;
mod terminal;
