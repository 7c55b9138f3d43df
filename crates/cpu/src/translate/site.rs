//! Where translated code can leave, and why.

use super::visible::Flags;
/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Read,
    /// Writes, or reads and writes.
    Write,
    /// Writes all of the operand and reads none of it.
    WriteOnly,
}

impl Use {
    pub(crate) fn writes(self) -> bool {
        self != Self::Read
    }
}

/// Why translated code leaves at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// `t0` holds the target of an indirect jump that no cache knows.
    Indirect,
    /// A signal was taken at [`Site`]-less code; the handler left the details in the vCPU.
    HostFault,
    /// The address in `t0` isn't in the inline TLB, or goes through a bounce buffer.
    Access(Access),
    /// The same for several accesses together: `t0` is where the span begins.
    Span(Access, Span),
    /// A stream of a loop has left its window; its lowest address is in the frame's `tmp[2]`.
    Loop(super::LoopMiss),
    /// The offset in `t0` goes through a segment that needs all checks; it becomes a linear address.
    Segment(Access),
    /// All of a bounced instruction was done: written operands go to memory.
    Commit,
    /// The same, and the instruction jumps to the address in `t0`.
    CommitIndirect,
    /// A direct jump that is not chained yet; the displacement of the host's jump or call is at
    /// `patch`.
    Link { patch: u32, by: By },
    /// An instruction for [`crate::system`]; the code behind it is at `resume`, unless that is zero.
    System { instruction: u32, resume: u32 },
    /// An instruction that is run in Rust.
    Rust { instruction: u32 },
    /// Not left by: an indirect branch, noted in the frame for the case that its target can't be
    /// reached, which is a fault of the branch.
    Branch(Branch),
    /// Always raises this exception.
    Raise { vector: u8, error_code: Option<u32> },
    /// A request is pending; nothing of the instruction was done.
    Poll,
    /// The block must be looked up again.
    Stale,
    /// The offset in `t0` lies outside of the segment's limit.
    Limit { segment: u8, waits: bool },
}

/// With what a link goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Jump,
    /// `call`: what it leads to begins by dropping the return address.
    Call,
}

/// What several accesses off one register touch; the lowest byte as a distance from it at the first of
/// them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) low: i32,
    /// Bytes from there on.
    pub(crate) length: u16,
    /// Where the first access is, from there.
    pub(crate) first: u16,
    /// Whether any of them writes.
    pub(crate) writes: bool,
    /// Offset in the cache of the displacement of the jump by which its cold stub leaves.
    pub(crate) exit: u32,
}

/// What an indirect branch did before it jumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Branch {
    /// By how much the stack pointer moved.
    pub(crate) moved: i32,
    /// Bytes of the return address that was written; 0 for none.
    pub(crate) pushed: u8,
}

/// One access of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Where the cache goes on once `t1` holds the addend.
    pub(crate) resume: u32,
    pub(crate) size: u16,
    pub(crate) usage: Use,
    /// Which bounce buffer.
    pub(crate) slot: u8,
    /// The segment, by its number in the encoding: which fault a bad address raises.
    pub(crate) segment: u8,
    /// The alignment without which it is `#GP`, before any page fault.
    pub(crate) align: u8,
    pub(crate) bounce: bool,
    /// The instruction finds a waiting x87 exception before it finds a fault here.
    pub(crate) waits: bool,
}

/// A place where translated code leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    /// RIP of the instruction, or where to go on for jumps.
    pub(crate) rip: u64,
    pub(crate) reason: Reason,
    /// Where the arithmetic flags are.
    pub(crate) flags: Flags,
}

// There are many.
const _: () = assert!(size_of::<Site>() == 40);

/// The site of [`Reason::Indirect`].
pub(crate) const SITE_INDIRECT: u32 = 0;
/// The site of [`Reason::HostFault`].
pub(crate) const SITE_HOST_FAULT: u32 = 1;
