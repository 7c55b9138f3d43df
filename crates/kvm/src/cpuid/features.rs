//! Feature bits of `CPUID` (SDM 2A, CPUID; APM 3, appendix E), and which of them a guest is offered.
//!
//! Two kinds: those whose instructions the host's CPU executes are offered where the host has them;
//! those that are the virtual CPU's own work (paging, MSRs, the APIC) are offered everywhere.

use kvm_bindings::kvm_cpuid_entry2;

/// XCR0 bits that the virtual CPU knows: x87, SSE, AVX.
pub const XCR0: u64 = 0b111;

/// A register of `CPUID`'s answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// Its value in an entry.
    pub fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }
}

/// Where a feature's bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bit {
    /// Leaf.
    pub function: u32,
    /// Subleaf.
    pub index: u32,
    /// Register.
    pub register: Register,
    /// Bit number.
    pub bit: u32,
}

const fn bit(function: u32, register: Register, bit: u32) -> Bit {
    Bit {
        function,
        index: 0,
        register,
        bit,
    }
}

#[allow(missing_docs, reason = "the names say it")]
impl Bit {
    pub const SSE3: Bit = bit(1, Register::Ecx, 0);
    pub const VMX: Bit = bit(1, Register::Ecx, 5);
    pub const PCID: Bit = bit(1, Register::Ecx, 17);
    pub const X2APIC: Bit = bit(1, Register::Ecx, 21);
    pub const TSC_DEADLINE: Bit = bit(1, Register::Ecx, 24);
    pub const XSAVE: Bit = bit(1, Register::Ecx, 26);
    pub const VME: Bit = bit(1, Register::Edx, 1);
    pub const DE: Bit = bit(1, Register::Edx, 2);
    pub const PSE: Bit = bit(1, Register::Edx, 3);
    pub const TSC: Bit = bit(1, Register::Edx, 4);
    pub const PAE: Bit = bit(1, Register::Edx, 6);
    pub const MCE: Bit = bit(1, Register::Edx, 7);
    pub const PGE: Bit = bit(1, Register::Edx, 13);
    pub const FXSR: Bit = bit(1, Register::Edx, 24);
    pub const SSE: Bit = bit(1, Register::Edx, 25);
    pub const FSGSBASE: Bit = bit(7, Register::Ebx, 0);
    pub const TSC_ADJUST: Bit = bit(7, Register::Ebx, 1);
    pub const SMEP: Bit = bit(7, Register::Ebx, 7);
    pub const SMAP: Bit = bit(7, Register::Ebx, 20);
    pub const UMIP: Bit = bit(7, Register::Ecx, 2);
    pub const PKU: Bit = bit(7, Register::Ecx, 3);
    pub const LA57: Bit = bit(7, Register::Ecx, 16);
    pub const RDPID: Bit = bit(7, Register::Ecx, 22);
    pub const SPEC_CTRL: Bit = bit(7, Register::Edx, 26);
    pub const ARCH_CAPABILITIES: Bit = bit(7, Register::Edx, 29);
    pub const XSAVES: Bit = Bit {
        function: 0xd,
        index: 1,
        register: Register::Eax,
        bit: 3,
    };
    pub const SVM: Bit = bit(0x8000_0001, Register::Ecx, 2);
    pub const OSVW: Bit = bit(0x8000_0001, Register::Ecx, 9);
    pub const SYSCALL: Bit = bit(0x8000_0001, Register::Edx, 11);
    pub const NX: Bit = bit(0x8000_0001, Register::Edx, 20);
    pub const FXSR_OPT: Bit = bit(0x8000_0001, Register::Edx, 25);
    pub const GIGABYTE_PAGES: Bit = bit(0x8000_0001, Register::Edx, 26);
    pub const RDTSCP: Bit = bit(0x8000_0001, Register::Edx, 27);
    pub const LONG_MODE: Bit = bit(0x8000_0001, Register::Edx, 29);
}

/// What is offered of one register.
pub(super) struct Offer {
    /// Where the host has it too.
    pub(super) host: u32,
    /// In any case.
    pub(super) own: u32,
}

impl Offer {
    /// The register's value for a guest, from the host's.
    pub(super) fn of(&self, host: u32) -> u32 {
        host & self.host | self.own
    }
}

const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < numbers.len() {
        word |= 1 << numbers[i];
        i += 1;
    }
    word
}

/// Leaf 1, ECX. Host: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AES,
/// XSAVE, AVX, F16C, RDRAND. Own: PCID, x2APIC, TSC deadline, hypervisor.
pub(super) const LEAF_1_ECX: Offer = Offer {
    host: bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]),
    own: bits(&[17, 21, 24, 31]),
};

/// Leaf 1, EDX. Host: FPU, CX8, CMOV, CLFLUSH, MMX, FXSR, SSE, SSE2, self-snoop. Own: DE, PSE, TSC,
/// MSR, PAE, MCE, APIC, SEP, MTRR, PGE, MCA, PAT, PSE-36.
pub(super) const LEAF_1_EDX: Offer = Offer {
    host: bits(&[0, 8, 15, 19, 23, 24, 25, 26, 27]),
    own: bits(&[2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17]),
};

/// Leaf 7.0, EBX. Host: BMI1, AVX2, `FDP_EXCPTN_ONLY`, BMI2, ERMS, no FCS/FDS, RDSEED, ADX,
/// CLFLUSHOPT, CLWB, SHA. Own: FSGSBASE, `TSC_ADJUST`, SMEP, INVPCID, SMAP.
pub(super) const LEAF_7_EBX: Offer = Offer {
    host: bits(&[3, 5, 6, 8, 9, 13, 18, 19, 23, 24, 29]),
    own: bits(&[0, 1, 7, 10, 20]),
};

/// Leaf 7.0, ECX. Own: UMIP, RDPID.
pub(super) const LEAF_7_ECX: Offer = Offer {
    host: 0,
    own: bits(&[2, 22]),
};

/// Leaf 7.0, EDX. Host: FSRM. Own: `SPEC_CTRL`, `ARCH_CAPABILITIES` (they let the guest's kernel drop
/// retpolines and page-table isolation, which mean nothing to a translated branch).
pub(super) const LEAF_7_EDX: Offer = Offer {
    host: bits(&[4]),
    own: bits(&[26, 29]),
};

/// Leaf 0xD.1, EAX: XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES, all of them the virtual CPU's.
pub(super) const LEAF_D_1_EAX: u32 = 0b1111;

/// Leaf `0x8000_0001`, ECX. Host: ABM, SSE4A, misaligned SSE, PREFETCHW. Own: LAHF in long mode,
/// CR8 by `LOCK MOV CR0`.
pub(super) const LEAF_80000001_ECX: Offer = Offer {
    host: bits(&[5, 6, 7, 8]),
    own: bits(&[0, 4]),
};

/// Leaf `0x8000_0001`, EDX. Host: FPU, CX8, CMOV, MMXEXT, MMX, FXSR. Own: DE, PSE, TSC, MSR, PAE,
/// MCE, APIC, SYSCALL, MTRR, PGE, MCA, PAT, PSE-36, NX, 1 GiB pages, RDTSCP, long mode.
pub(super) const LEAF_80000001_EDX: Offer = Offer {
    host: bits(&[0, 8, 15, 22, 23, 24]),
    own: bits(&[2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17, 20, 26, 27, 29]),
};

/// The bits of leaf 1, EDX, that an AMD CPU shows again in leaf `0x8000_0001`; an Intel CPU shows
/// there only SYSCALL, NX, 1 GiB pages, RDTSCP and long mode.
pub(super) const LEAF_80000001_EDX_INTEL: u32 = bits(&[11, 20, 26, 27, 29]);

/// Leaf `0x8000_0008`, EBX: CLZERO where the host has it; no speculative store bypass, no
/// Spectre-like leak between privilege levels that the guest's kernel could close.
pub(super) const LEAF_80000008_EBX: Offer = Offer {
    host: bits(&[0]),
    own: 0,
};

/// Leaf `0x8000_0021`, EAX: LFENCE serialises, null selectors clear the base, no SMM control MSR;
/// SRSO can't be worked round from inside.
pub(super) const LEAF_80000021_EAX: u32 = bits(&[2, 6, 9, 29]);

/// `IA32_ARCH_CAPABILITIES`: not affected by Meltdown, L1TF, store bypass, MDS, TAA and their kin, and
/// IBRS in force always: whatever leaks, leaks in the host process, where no guest kernel's
/// mitigation helps.
pub const ARCH_CAPABILITIES: u64 = 1 << 0 // RDCL_NO
    | 1 << 1 // IBRS_ALL
    | 1 << 3 // SKIP_L1DFL_VMENTRY
    | 1 << 4 // SSB_NO
    | 1 << 5 // MDS_NO
    | 1 << 6 // IF_PSCHANGE_MC_NO
    | 1 << 8 // TAA_NO
    | 1 << 13 // SBDR_SSDP_NO
    | 1 << 14 // FBSDP_NO
    | 1 << 15 // PSDP_NO
    | 1 << 20 // BHI_NO
    | 1 << 24 // PBRSB_NO
    | 1 << 26 // GDS_NO
    | 1 << 27; // RFDS_NO
