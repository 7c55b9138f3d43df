//! The task-state segment in its three shapes (SDM 3A, 9.2, 9.6 and 9.7).

/// 32-bit TSS.
pub mod tss32 {
    #![allow(missing_docs, reason = "the manuals' names")]
    pub const LINK: u32 = 0;
    pub const ESP0: u32 = 4;
    pub const CR3: u32 = 28;
    pub const EIP: u32 = 32;
    pub const EFLAGS: u32 = 36;
    pub const EAX: u32 = 40;
    pub const ES: u32 = 72;
    pub const LDT: u32 = 96;
    pub const TRAP: u32 = 100;
    pub const IO_MAP_BASE: u32 = 102;
    /// The smallest limit that holds the state a task switch loads.
    pub const MIN_LIMIT: u32 = 103;
}

/// 16-bit TSS.
pub mod tss16 {
    #![allow(missing_docs, reason = "the manuals' names")]
    pub const LINK: u32 = 0;
    pub const SP0: u32 = 2;
    pub const IP: u32 = 14;
    pub const FLAGS: u32 = 16;
    pub const AX: u32 = 18;
    pub const ES: u32 = 34;
    pub const LDT: u32 = 42;
    /// The smallest limit that holds the state a task switch loads.
    pub const MIN_LIMIT: u32 = 43;
}

/// 64-bit TSS.
pub mod tss64 {
    #![allow(missing_docs, reason = "the manuals' names")]
    pub const RSP0: u32 = 4;
    pub const IST1: u32 = 36;
    pub const IO_MAP_BASE: u32 = 102;
}
