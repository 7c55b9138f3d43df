//! A machine: memory, boot protocols, buses, vCPU threads; on either accelerator.
//!
//! [`Machine::build`] takes a [`MachineConfig`] and an accelerator and makes a PC: RAM in slots,
//! interrupt controllers, ACPI tables, two serial ports, a clock, a PCI bus with the virtio devices
//! that the configuration brings, and a kernel ready to start. [`Machine::run`] runs it to its end.
//!
//! ```text
//!   MachineConfig ─> Machine::build ──┬─ layout   what lies where
//!                                     ├─ ram      blocks of RAM
//!                                     ├─ space    what lies where; memory slots
//!                                     ├─ boot     kernel, initrd, command line, entry state
//!                                     ├─ acpi     tables
//!                                     └─ cpus     CPUID, registers
//!   Machine::run ── one thread a vCPU: accel::Vcpu::run -> Exit -> buses -> devices
//! ```

mod acpi;
mod boot;
mod config;
mod cpus;
mod error;
mod interrupts;
mod layout;
mod machine;
mod outcome;
mod pause;
mod ram;
mod remote;
mod run;
mod space;

pub use boot::{BootError, unpacked_kernel};
pub use config::{Initrd, MachineConfig, SerialOutput};
pub use error::BuildError;
pub use machine::{Input, Machine, Stopper};
pub use outcome::{Crash, Outcome};
pub use pause::{Hold, PauseError};
pub use remote::{Facts, Region, RegionKind, Remote};
