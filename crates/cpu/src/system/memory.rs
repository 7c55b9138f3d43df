//! What system instructions and event delivery need of guest memory.
//!
//! They read and write linear addresses: descriptor tables, TSS, stacks, operands. The CPU gives
//! them its own TLB through this trait; tests give them an array.

use addr::{Gpa, Gva};

use super::Abort;
use crate::CpuState;

/// With whose rights memory is touched (SDM 3A, 5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// An explicit access at CPL 0 to 2 with `RFLAGS.AC` clear: SMAP applies.
    Supervisor,
    /// An explicit access at CPL 0 to 2 with `RFLAGS.AC` set.
    SupervisorAcSet,
    /// The CPU's own accesses to descriptor tables, TSS and inner stacks, at any CPL.
    Implicit,
}

/// Which translations are no longer valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// All of them, global ones and those of every PCID included.
    All,
    /// All but the global ones, of every PCID.
    NonGlobal,
    /// The present PCID's, but not global ones.
    CurrentPcid,
    /// Those of one PCID, but not global ones.
    Pcid(u16),
    /// The page that holds this address: in the present PCID, and global.
    Page(Gva),
    /// The page that holds this address in one PCID, unless it is global.
    PcidPage(u16, Gva),
}

/// Guest memory by linear address, through the paging in force.
///
/// An access either happens as a whole or not at all: where it crosses a page both pages are
/// checked before a byte is written. An aligned access of up to eight bytes is one access for other
/// CPUs too.
///
/// A read of device memory that has no answer yet is `Err(Abort::Exit(Exit::Mmio))`; the instruction
/// or the delivery is then begun again with the answers so far. A write to device memory is queued
/// and leaves after the instruction.
pub trait LinearMemory {
    /// Reads `data.len()` bytes at `gva`.
    fn read(&mut self, gva: Gva, data: &mut [u8], privilege: Privilege) -> Result<(), Abort>;

    /// Writes `data` at `gva`.
    fn write(&mut self, gva: Gva, data: &[u8], privilege: Privilege) -> Result<(), Abort>;

    /// Fails as a write of `len` bytes would, but writes nothing. `len` is at most 4096.
    fn check_write(&mut self, gva: Gva, len: usize, privilege: Privilege) -> Result<(), Abort>;

    /// Locked compare and exchange of the eight bytes at `gva` (accessed and busy bits of
    /// descriptors). Whether they were `current` and are now `new`.
    fn compare_exchange(
        &mut self,
        gva: Gva,
        current: u64,
        new: u64,
        privilege: Privilege,
    ) -> Result<bool, Abort>;

    /// Reads guest physical memory (the four entries that CR3 names in PAE paging).
    fn read_physical(&mut self, gpa: Gpa, data: &mut [u8]) -> Result<(), Abort>;

    /// CR0, CR3, CR4, EFER, PDPTEs or PKRU have changed: from now on these rule. Drops nothing that
    /// the architecture lets the CPU keep; that is [`LinearMemory::flush`].
    fn paging_changed(&mut self, state: &CpuState);

    /// Translations that must not be used any more.
    fn flush(&mut self, flush: Flush);
}
