//! Which extensions of the instruction set are compared.

use iced_x86::CpuidFeature;

/// Why a form is not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exclusion {
    /// The encoding doesn't exist in this mode.
    OtherMode,
    /// AVX-512, AMX, Knights Corner: a guest's CPUID doesn't offer them.
    NotOffered,
    /// Extensions of other vendors or of earlier processors; obsolete encodings.
    OtherProcessor,
    /// The host's silicon answers `#UD`.
    HostLacksIt,
    /// Not an instruction: iced's pseudo instructions.
    Pseudo,
    /// `FWAIT` and another form: two instructions, both compared by themselves.
    TwoInstructions,
    /// What it does is up to the operating system: `SYSCALL`, `INT 0x80`.
    OperatingSystem,
    /// The host's kernel emulates it for user mode (UMIP).
    KernelEmulates,
    /// Its result is the monitor's: `CPUID`.
    MonitorAnswers,
    /// The hypervisor below this host gets it wrong.
    HostHypervisor,
    /// Vendors differ, and manuals leave it to them.
    VendorsDiffer,
    /// iced's encoder can't write it.
    NoEncoder,
}

impl Exclusion {
    /// A line for the report.
    pub fn reason(self) -> &'static str {
        match self {
            Self::OtherMode => "does not exist in this mode",
            Self::NotOffered => "not offered to guests: AVX-512, AMX and what came after AVX2",
            Self::OtherProcessor => "other vendors' or earlier processors' encodings",
            Self::HostLacksIt => "#UD on this host",
            Self::Pseudo => "pseudo instruction of the decoder",
            Self::TwoInstructions => "FWAIT and another form, both covered",
            Self::OperatingSystem => "enters the operating system",
            Self::KernelEmulates => "the host's kernel emulates it (UMIP)",
            Self::MonitorAnswers => "its answer is the monitor's",
            Self::HostHypervisor => "the hypervisor below this host reports another RIP",
            Self::VendorsDiffer => "vendors differ, the manuals leave it open",
            Self::NoEncoder => "no encoding found",
        }
    }
}

/// Whether forms of this extension are compared. Whether the host has it, it says itself.
pub(super) fn exclusion(feature: CpuidFeature) -> Option<Exclusion> {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::ADX
        | F::AES
        | F::AVX
        | F::AVX2
        | F::BMI1
        | F::BMI2
        | F::CLFLUSHOPT
        | F::CLFSH
        | F::CLWB
        | F::CMOV
        | F::CMPXCHG16B
        | F::CPUID
        | F::CX8
        | F::F16C
        | F::FMA
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FSGSBASE
        | F::FXSR
        | F::LZCNT
        | F::MMX
        | F::MOVBE
        | F::MSR
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::PCLMULQDQ
        | F::POPCNT
        | F::PREFETCHW
        | F::RDPMC
        | F::RDRAND
        | F::RDSEED
        | F::RDTSCP
        | F::SHA
        | F::SMAP
        | F::SSE
        | F::SSE2
        | F::SSE3
        | F::SSE4_1
        | F::SSE4_2
        | F::SSE4A
        | F::SSSE3
        | F::TSC
        | F::XSAVE
        | F::XSAVEC
        | F::XSAVEOPT => None,
        F::SYSCALL | F::SEP => Some(Exclusion::OperatingSystem),
        F::INTEL8086_ONLY
        | F::INTEL286_ONLY
        | F::INTEL386_ONLY
        | F::INTEL386_A0_ONLY
        | F::INTEL486_A_ONLY
        | F::UMOV
        | F::IA64
        | F::D3NOW
        | F::D3NOWEXT
        | F::OSS
        | F::FMA4
        | F::FPU287XL_ONLY
        | F::FPU387SL_ONLY
        | F::CYRIX_D3NOW
        | F::LWP
        | F::TBM
        | F::XOP
        | F::MPX
        | F::MOV_TR
        | F::CENTAUR_AIS
        | F::CYRIX_FPU
        | F::CYRIX_SMM
        | F::CYRIX_SMINT
        | F::CYRIX_SMINT_0F7E
        | F::CYRIX_SHR
        | F::CYRIX_DDI
        | F::CYRIX_EMMI
        | F::CYRIX_DMI
        | F::PADLOCK_ACE
        | F::PADLOCK_PHE
        | F::PADLOCK_PMM
        | F::PADLOCK_RNG
        | F::PADLOCK_GMI
        | F::PADLOCK_UNDOC
        | F::KNC
        | F::UDBG => Some(Exclusion::OtherProcessor),
        _ => Some(Exclusion::NotOffered),
    }
}
