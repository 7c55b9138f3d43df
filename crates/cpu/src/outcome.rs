//! How an instruction, or a run of them, ends.
//!
//! Three outcomes, three types, never mixed: an [`Exception`] is the guest's affair and is delivered
//! through its IDT; an [`Exit`] is the monitor's; a [`HostFault`] is this host's failure to provide
//! guest memory.

use addr::{Gpa, Gva, Hva};

/// A fault, trap or abort of the architecture (SDM 3A, chapter 7).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// The error code, where this exception pushes one.
    pub error_code: Option<u32>,
    /// CR2 for `#PF`, the new bits of DR6 for `#DB`.
    pub payload: Option<u64>,
}

/// The host could not provide a page of guest memory: a truncated file, `PROT_NONE`, a poisoned
/// page. `KVM_RUN` answers `EFAULT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// Where in guest physical memory, where known.
    pub gpa: Option<Gpa>,
    /// Where in the monitor's address space.
    pub hva: Hva,
}

/// Why guest code was left: what the monitor must see or do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// `IN`/`OUT`/`INS`/`OUTS` to a port that nobody below the monitor handles.
    Io(IoExit),
    /// An access to a guest physical address in no slot (or a write to a read-only one).
    Mmio(MmioExit),
    /// `HLT`, and nobody below the monitor waits for the interrupt.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The monitor asked to be told when an interrupt can be taken.
    InterruptWindow,
    /// A debug event that the monitor asked for.
    Debug(DebugExit),
    /// `VMCALL`/`VMMCALL` that the platform hands up.
    Hypercall(HypercallExit),
    /// `RDMSR`/`WRMSR` that the platform hands up.
    Msr(MsrExit),
    /// The state given by the monitor can't be entered.
    FailEntry {
        /// A reason in the terms of the physical CPU.
        reason: u64,
    },
    /// An instruction that this CPU can't run.
    InternalError(InternalError),
    /// Asked to leave: a signal, `immediate_exit`, a kick.
    Interrupted,
    /// Memory of the guest is not to be had on the host.
    HostFault(HostFault),
}

/// A port access. On `in`, the answer is given to [`crate::Vcpu::complete_io`] before the next run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "KVM's names")]
pub struct IoExit {
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    pub direction: IoDirection,
    /// Elements of `size` bytes, more than one only for string instructions.
    pub count: u32,
}

/// Which way a port access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoDirection {
    /// Device to guest.
    In,
    /// Guest to device.
    Out,
}

/// A device access by memory; at most 8 bytes at a time, as KVM splits them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "KVM's names")]
pub struct MmioExit {
    pub gpa: Gpa,
    pub len: u8,
    /// The bytes to write; on a read, the answer goes to [`crate::Vcpu::complete_mmio`].
    pub write: Option<[u8; 8]>,
}

/// A debug event for the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "KVM's names")]
pub struct DebugExit {
    pub vector: u8,
    pub pc: Gva,
    pub dr6: u64,
    pub dr7: u64,
}

/// A hypercall with its registers (KVM's ABI: number in RAX, arguments in RBX, RCX, RDX, RSI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "KVM's names")]
pub struct HypercallExit {
    pub nr: u64,
    pub args: [u64; 4],
    pub long_mode: bool,
}

/// An MSR access for the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "KVM's names")]
pub struct MsrExit {
    pub index: u32,
    /// The value of a `WRMSR`; `None` for `RDMSR`.
    pub write: Option<u64>,
    pub reason: u32,
}

/// An instruction that can't be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// Its bytes, as far as they could be read.
    pub bytes: [u8; 15],
    /// How many of them.
    pub len: u8,
}
