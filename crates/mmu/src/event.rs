//! Faults, for somebody who wants to watch them.
//!
//! A VM has at most one subscriber. Where there is none, a fault costs one branch more. The
//! subscriber is called in the vCPU's thread, in guest mode, with none of the MMU's locks held: it
//! must not block and must not call back into the MMU's changes. The fourth address, the host
//! physical one, is the subscriber's to look up ([`memory`]'s page map): that costs system calls.

use addr::{Gpa, Gva, Hva, PageSize};
use x86::page_fault::PageFaultCode;

use crate::PagingPath;
use crate::access::Access;

/// Why the MMU had to do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing was installed for the page yet: the lazy MMU at work.
    NotPresent,
    /// The page was there, but writes to it had to be noticed (dirty log).
    WriteProtected,
    /// Another vCPU was faster.
    Spurious,
    /// Direct path: the TLB was filled, which is all that this path has.
    TlbFill,
    /// The guest's own page fault.
    Guest(PageFaultCode),
    /// In no memslot: device memory.
    Mmio,
    /// A write to a read-only memslot.
    ReadOnly,
    /// A guest page table lies where the host has no memory.
    Host,
}

/// What was installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The size of the entry.
    pub size: PageSize,
    /// Whether writes go on without another fault.
    pub writable: bool,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultEvent {
    /// Which vCPU.
    pub vcpu: u32,
    /// Which path served it.
    pub path: PagingPath,
    /// Why.
    pub cause: Cause,
    /// What the guest did.
    pub access: Access,
    /// RIP of the instruction that did it, as far as the CPU told
    /// ([`crate::VcpuMmu::set_instruction`]).
    pub rip: u64,
    /// Where.
    pub gva: Gva,
    /// Where that is in guest physical memory, where the guest's tables say so. A fault on a guest
    /// page table itself (nested) names the table's entry.
    pub gpa: Option<Gpa>,
    /// Where that is in the monitor's memory.
    pub hva: Option<Hva>,
    /// What was installed or changed.
    pub installed: Option<Installed>,
    /// Time taken, from the call to the entry.
    pub nanoseconds: u64,
}

/// Somebody who watches.
pub trait Subscriber: Send + Sync {
    /// One fault was handled.
    fn fault(&self, event: &FaultEvent);
}
