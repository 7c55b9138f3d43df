//! A virtual CPU that translates x86-64 guest code to x86-64 host code.

mod emit;
mod engine;
pub mod fpu;
pub mod outcome;
pub mod platform;
pub mod state;
pub mod system;
mod translate;

/// Which handlers stand behind the engine's own for the host's traps.
pub mod traps {
    pub use crate::engine::{previous, replace_previous};
}

pub use engine::{BlockLength, CodeMap, TlbEntry, Translation, Vcpu, VcpuConfig, VcpuKick};
pub use outcome::{
    DebugExit, Exception, Exit, HostFault, HypercallExit, InternalError, IoDirection, IoExit,
    MmioExit, MsrExit,
};
pub use platform::{
    CpuidResult, DeviceInstructions, Handled, HypercallInstruction, Platform, Refusal,
};
pub use state::{CpuMsrs, CpuState, Events, InjectedInterrupt, Segment, Segments, TableRegister};
pub use translate::Branches;
