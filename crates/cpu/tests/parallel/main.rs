//! Several vCPUs on one memory, as threads: locked updates, locks, the memory model, code that another
//! vCPU patches, slots that come and go, kicks.

#[path = "../machine/mod.rs"]
mod machine;

mod litmus;
mod locks;
mod monitor;
mod patches;
mod threads;
