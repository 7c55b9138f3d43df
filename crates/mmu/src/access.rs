//! What is asked of the MMU, and what it answers.

use addr::{Gpa, Gva, Hva, PageSize};
use x86::page_fault::PageFaultCode;

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write; an instruction that reads and writes asks for a write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// On whose behalf (SDM 3A, 5.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// Explicit, CPL below 3, `EFLAGS.AC` clear: SMAP applies.
    Supervisor,
    /// Explicit, CPL below 3, `EFLAGS.AC` set: SMAP does not apply.
    SupervisorAcSet,
    /// Implicit access to a system structure (GDT, IDT, LDT, TSS) at any CPL: SMAP applies.
    Implicit,
}

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What.
    pub kind: AccessKind,
    /// For whom.
    pub privilege: Privilege,
}

impl Access {
    /// This kind, for this privilege.
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        Self { kind, privilege }
    }

    /// Whether it writes.
    pub fn is_write(self) -> bool {
        self.kind == AccessKind::Write
    }

    /// Whether it fetches an instruction.
    pub fn is_fetch(self) -> bool {
        self.kind == AccessKind::Execute
    }

    /// Whether it is one of CPL 3.
    pub fn is_user(self) -> bool {
        self.privilege == Privilege::User
    }
}

/// Where an address leads, and which TLB entry may be made of it.
///
/// `readable`, `writable` and `executable` say what the *same privilege* may do on this page
/// without asking again; the kind of access that was asked for is always among them. A TLB that
/// serves several privileges with one entry must know `user`: a supervisor's answer says nothing
/// about a user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: Gpa,
    /// Host virtual address of the byte asked for.
    pub hva: Hva,
    /// The largest naturally aligned page around the byte for which the same answer holds: the
    /// guest's page and the memslot both cover it.
    pub size: PageSize,
    /// The size of the guest's page: what `INVLPG` of any address in it invalidates.
    pub guest_size: PageSize,
    /// A user page: every entry on the way has U/S set.
    pub user: bool,
    /// Reads may go on without asking (false only where a protection key forbids them).
    pub readable: bool,
    /// Writes may go on without asking: rights allow it, the guest's D bit is set, the memslot is
    /// writable and its dirty log knows of the page.
    pub writable: bool,
    /// Fetches may go on without asking.
    pub executable: bool,
    /// A global page, with CR4.PGE.
    pub global: bool,
    /// The protection key; 0 where protection keys are not in force.
    pub pkey: u8,
}

/// A page fault for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// For CR2.
    pub gva: Gva,
    /// What `#PF` pushes.
    pub error_code: PageFaultCode,
}

/// An access to guest memory that the host couldn't serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFault {
    /// Where in guest physical memory.
    pub gpa: Gpa,
    /// Where in the monitor's address space.
    pub hva: Hva,
}

/// Why an address leads nowhere. None of these is an error of the MMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The guest's tables forbid it: `#PF`.
    Page(PageFault),
    /// The guest's tables lead to an address in no memslot.
    Mmio {
        /// That address.
        gpa: Gpa,
    },
    /// A write to a read-only memslot: it leaves as MMIO, reads don't.
    ReadOnly {
        /// The address.
        gpa: Gpa,
        /// Where reads find it.
        hva: Hva,
    },
    /// A guest page table lies in memory that the host couldn't serve.
    Host(HostFault),
}
