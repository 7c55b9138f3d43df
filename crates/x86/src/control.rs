//! Control registers and EFER (SDM 3A, 2.5; SDM 4, 2.16.1 for EFER).

use bitflags::bitflags;

bitflags! {
    /// CR0.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1 << 0;
        /// Monitor coprocessor: `WAIT` heeds TS.
        const MP = 1 << 1;
        /// Emulation: x87 instructions raise `#NM`.
        const EM = 1 << 2;
        /// Task switched: the next x87/SSE/AVX instruction raises `#NM`.
        const TS = 1 << 3;
        /// Extension type, always 1.
        const ET = 1 << 4;
        /// Numeric error: x87 errors raise `#MF`.
        const NE = 1 << 5;
        /// Write protect: read-only pages bind the supervisor too.
        const WP = 1 << 16;
        /// Alignment mask: enables alignment checks.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
        /// Unnamed bits are kept as they are.
        const _ = !0;
    }
}

bitflags! {
    /// CR4.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// `RDTSC` at CPL 0 only.
        const TSD = 1 << 2;
        /// Debugging extensions.
        const DE = 1 << 3;
        /// 4 MiB pages in 32-bit paging.
        const PSE = 1 << 4;
        /// Physical address extension: 64-bit entries.
        const PAE = 1 << 5;
        /// Machine checks.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// `RDPMC` at any CPL.
        const PCE = 1 << 8;
        /// `FXSAVE`, `FXRSTOR` and SSE are supported by the OS.
        const OSFXSR = 1 << 9;
        /// Unmasked SIMD exceptions are supported by the OS.
        const OSXMMEXCPT = 1 << 10;
        /// `SGDT`, `SIDT`, `SLDT`, `SMSW` and `STR` at CPL 0 only.
        const UMIP = 1 << 11;
        /// 5-level paging.
        const LA57 = 1 << 12;
        /// VMX.
        const VMXE = 1 << 13;
        /// SMX.
        const SMXE = 1 << 14;
        /// `RDFSBASE` and its family.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// `XSAVE` is supported by the OS.
        const OSXSAVE = 1 << 18;
        /// Key Locker.
        const KL = 1 << 19;
        /// The supervisor fetches no instructions from user pages.
        const SMEP = 1 << 20;
        /// The supervisor touches no data of user pages.
        const SMAP = 1 << 21;
        /// Protection keys for user pages.
        const PKE = 1 << 22;
        /// Control-flow enforcement.
        const CET = 1 << 23;
        /// Protection keys for supervisor pages.
        const PKS = 1 << 24;
        /// User interrupts.
        const UINTR = 1 << 25;
        /// Linear-address masking for supervisor addresses.
        const LAM_SUP = 1 << 28;
        /// Unnamed bits are kept as they are.
        const _ = !0;
    }
}

bitflags! {
    /// EFER, MSR `0xc000_0080`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Efer: u64 {
        /// `SYSCALL` and `SYSRET`.
        const SCE = 1 << 0;
        /// Long mode enabled: IA-32e mode begins with CR0.PG.
        const LME = 1 << 8;
        /// Long mode active.
        const LMA = 1 << 10;
        /// Execute-disable bit in page tables.
        const NXE = 1 << 11;
        /// SVM (AMD).
        const SVME = 1 << 12;
        /// Long-mode segment limits (AMD).
        const LMSLE = 1 << 13;
        /// Fast `FXSAVE` (AMD).
        const FFXSR = 1 << 14;
        /// Unnamed bits are kept as they are.
        const _ = !0;
    }
}

/// CR3, bits 11:0 with `CR4.PCIDE`: the process-context identifier.
pub const CR3_PCID: u64 = 0xfff;
/// CR3, bit 63 of the value that `MOV CR3` writes with `CR4.PCIDE`: keep the TLB.
pub const CR3_NO_FLUSH: u64 = 1 << 63;
