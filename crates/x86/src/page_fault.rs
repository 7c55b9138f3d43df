//! The error code of `#PF` (SDM 3A, 5.7).

use bitflags::bitflags;

bitflags! {
    /// What a page fault pushes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct PageFaultCode: u32 {
        /// The page was present: its rights forbade the access. Clear: an entry was not present.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access came from CPL 3.
        const USER = 1 << 2;
        /// An entry had a reserved bit set.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch (told only where NX or SMEP is in force).
        const FETCH = 1 << 4;
        /// A protection key forbade the access.
        const PROTECTION_KEY = 1 << 5;
        /// A shadow-stack access.
        const SHADOW_STACK = 1 << 6;
        /// SGX.
        const SGX = 1 << 15;
    }
}
