//! What the server needs of a machine, whoever runs it.

use std::sync::Arc;

use accel::Errno;
use addr::Gva;
use explain::{SlotRange, TlbSide};
use kvm_bindings::{kvm_regs, kvm_sregs};
use mmu::{Mmu, PagingFeatures, Privilege};
use vmm::PauseError;

use crate::api::{RegionSide, State, Status};

/// A machine that can be looked at and stopped.
pub trait Machine: Send + Sync + 'static {
    /// What it is.
    fn status(&self) -> Status;
    /// Its memory slots.
    fn slots(&self) -> Result<Vec<SlotRange>, Trouble>;
    /// What lies where in guest physical memory.
    fn regions(&self) -> Result<Vec<RegionSide>, Trouble>;
    /// Its MMU, where that is ours.
    fn mmu(&self) -> Result<Option<Arc<Mmu>>, Trouble>;
    /// Stops all vCPUs between two instructions, for as long as the answer lives.
    fn hold(&self) -> Result<Box<dyn Held>, Trouble>;
    /// Stops them until it is asked again, or lets them go on.
    fn set_state(&self, wanted: Wanted) -> Result<State, Trouble>;
    /// Ends it.
    fn stop(&self) -> Result<(), Trouble>;
}

/// A state that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// vCPUs stopped.
    Paused,
    /// vCPUs running.
    Running,
}

/// Stopped vCPUs.
pub trait Held: Send {
    /// Reads one; with an address, also what its TLB holds for it and this privilege.
    fn vcpu(&self, index: u32, tlb: Option<(Gva, Privilege)>) -> Result<VcpuState, Trouble>;
    /// `KVM_TRANSLATE`: the guest physical address, if there is one.
    fn translate(&self, index: u32, gva: Gva) -> Result<Option<addr::Gpa>, Trouble>;
}

/// A vCPU, as it stands.
#[derive(Clone, Debug)]
pub struct VcpuState {
    /// `KVM_GET_REGS`.
    pub regs: kvm_regs,
    /// `KVM_GET_SREGS`.
    pub sregs: kvm_sregs,
    /// What its CPUID says about paging.
    pub features: PagingFeatures,
    /// The PDPTEs that the CPU has loaded, where it pages with them and tells.
    pub pdptrs: Option<[u64; 4]>,
    /// PKRU.
    pub pkru: u32,
    /// What the TLB holds, if asked.
    pub tlb: Option<TlbSide>,
}

/// Why a machine could not answer.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// vCPUs did not stop, or there is no such vCPU.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// The same, of a program's VM.
    #[error(transparent)]
    StillRuns(#[from] kvm::StillRuns),
    /// It is being built.
    #[error("the machine is starting: ask again in a moment")]
    Starting,
    /// A call of the KVM API failed.
    #[error("{call}: {cause}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// How.
        cause: Errno,
    },
    /// The host's page tables can't be read.
    #[error(transparent)]
    Pagemap(#[from] memory::pagemap::PagemapError),
    /// What was asked makes no sense.
    #[error("{0}")]
    Question(String),
    /// This machine can't do it.
    #[error("{0}")]
    Unsupported(String),
}
