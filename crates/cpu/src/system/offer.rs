//! What the guest's CPUID offers, as masks of register bits.

use x86::control::{Cr4, Efer};

use crate::CpuidResult;
use crate::fpu::PointerRules;

/// Which bits of the CPU's registers exist for this guest.
///
/// Derived from the guest's CPUID whenever that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bits of CR4 that can be set.
    pub cr4: u64,
    /// Bits of EFER that can be set.
    pub efer: u64,
    /// Bits of XCR0 that can be set.
    pub xcr0: u64,
    /// Width of a physical address.
    pub physical_bits: u32,
    /// Instructions that a CPUID bit of their own announces.
    pub instructions: Instructions,
    /// What is kept of the x87 pointers.
    pub x87: PointerRules,
    /// Whose manual is followed where the two differ.
    pub vendor: Vendor,
}

/// Who made the CPU, as CPUID leaf 0 says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, and whoever is unknown.
    #[default]
    Intel,
    /// AMD and Hygon.
    Amd,
}

bitflags::bitflags! {
    /// Instructions that raise `#UD` where CPUID doesn't announce them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Instructions: u32 {
        /// `RDTSCP`.
        const RDTSCP = 1 << 0;
        /// `RDPID`.
        const RDPID = 1 << 1;
        /// `INVPCID`.
        const INVPCID = 1 << 2;
        /// `XSAVEOPT`.
        const XSAVEOPT = 1 << 4;
        /// `XSAVEC`.
        const XSAVEC = 1 << 5;
        /// `XGETBV` with ECX 1.
        const XGETBV1 = 1 << 6;
        /// `XSAVES` and `XRSTORS`.
        const XSAVES = 1 << 7;
        /// `STAC` and `CLAC`.
        const SMAP = 1 << 8;
        /// Long mode: `SYSCALL` in 64-bit mode.
        const LONG_MODE = 1 << 9;
        /// `SYSENTER` and `SYSEXIT`.
        const SYSENTER = 1 << 10;
    }
}

/// Bits of CR4 that every guest may set: their features are as old as the Pentium III, and KVM's
/// users set them without a CPUID to say so.
const CR4_ALWAYS: Cr4 = Cr4::VME
    .union(Cr4::PVI)
    .union(Cr4::TSD)
    .union(Cr4::DE)
    .union(Cr4::PSE)
    .union(Cr4::PAE)
    .union(Cr4::MCE)
    .union(Cr4::PGE)
    .union(Cr4::PCE)
    .union(Cr4::OSFXSR)
    .union(Cr4::OSXMMEXCPT);

/// A physical address where CPUID doesn't say how wide it is.
const DEFAULT_PHYSICAL_BITS: u32 = 36;

impl Offer {
    /// Reads it from the guest's CPUID, given as a function of leaf and subleaf.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> CpuidResult) -> Self {
        let basic = cpuid(1, 0);
        let structured = cpuid(7, 0);
        let xsave = cpuid(0xd, 0);
        let xsave1 = cpuid(0xd, 1);
        let extended = cpuid(0x8000_0001, 0);
        let vendor = vendor_of(cpuid(0, 0));
        let has_xsave = basic.ecx & 1 << 26 != 0;
        Self {
            cr4: offered_cr4(basic, structured),
            efer: offered_efer(extended),
            xcr0: if has_xsave {
                u64::from(xsave.eax) | u64::from(xsave.edx) << 32
            } else {
                0
            },
            physical_bits: physical_bits(&mut cpuid),
            instructions: offered_instructions(basic, structured, xsave1, extended),
            x87: pointer_rules(vendor, structured),
            vendor,
        }
    }
}

fn offered_cr4(basic: CpuidResult, structured: CpuidResult) -> u64 {
    let optional = [
        (structured.ecx, 2, Cr4::UMIP),
        (structured.ecx, 16, Cr4::LA57),
        (structured.ebx, 0, Cr4::FSGSBASE),
        (basic.ecx, 17, Cr4::PCIDE),
        (basic.ecx, 26, Cr4::OSXSAVE),
        (structured.ebx, 7, Cr4::SMEP),
        (structured.ebx, 20, Cr4::SMAP),
        (structured.ecx, 3, Cr4::PKE),
    ];
    let chosen = optional
        .iter()
        .filter(|(register, bit, _)| register >> bit & 1 != 0);
    chosen.fold(CR4_ALWAYS.bits(), |bits, (_, _, bit)| bits | bit.bits())
}

fn offered_efer(extended: CpuidResult) -> u64 {
    let mut efer = Efer::SCE;
    if extended.edx & 1 << 29 != 0 {
        efer |= Efer::LME | Efer::LMA;
    }
    if extended.edx & 1 << 20 != 0 {
        efer |= Efer::NXE;
    }
    if extended.edx & 1 << 25 != 0 {
        efer |= Efer::FFXSR;
    }
    efer.bits()
}

fn physical_bits(cpuid: &mut impl FnMut(u32, u32) -> CpuidResult) -> u32 {
    if cpuid(0x8000_0000, 0).eax < 0x8000_0008 {
        return DEFAULT_PHYSICAL_BITS;
    }
    match cpuid(0x8000_0008, 0).eax & 0xff {
        0 => DEFAULT_PHYSICAL_BITS,
        bits => bits.min(52),
    }
}

fn offered_instructions(
    basic: CpuidResult,
    structured: CpuidResult,
    xsave1: CpuidResult,
    extended: CpuidResult,
) -> Instructions {
    let table = [
        (extended.edx, 27, Instructions::RDTSCP),
        (structured.ecx, 22, Instructions::RDPID),
        (structured.ebx, 10, Instructions::INVPCID),
        (xsave1.eax, 0, Instructions::XSAVEOPT),
        (xsave1.eax, 1, Instructions::XSAVEC),
        (xsave1.eax, 2, Instructions::XGETBV1),
        (xsave1.eax, 3, Instructions::XSAVES),
        (structured.ebx, 20, Instructions::SMAP),
        (extended.edx, 29, Instructions::LONG_MODE),
        (basic.edx, 11, Instructions::SYSENTER),
    ];
    let announced = table
        .iter()
        .filter(|(register, bit, _)| register >> bit & 1 != 0);
    announced.fold(Instructions::empty(), |all, &(_, _, one)| all | one)
}

/// What leaf 0 has in EBX: the first letters of the name.
fn vendor_of(leaf: CpuidResult) -> Vendor {
    match &leaf.ebx.to_le_bytes() {
        b"Auth" | b"Hygo" => Vendor::Amd,
        _ => Vendor::Intel,
    }
}

fn pointer_rules(vendor: Vendor, structured: CpuidResult) -> PointerRules {
    let mut rules = PointerRules::empty();
    rules.set(PointerRules::SAVED_IF_PENDING, vendor == Vendor::Amd);
    let structured = |bit: u32| structured.ebx >> bit & 1 != 0;
    rules.set(PointerRules::DATA_IF_PENDING, structured(6));
    rules.set(PointerRules::NO_SELECTORS, structured(13));
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_announced() {
        let offer = Offer::from_cpuid(|_, _| CpuidResult::default());
        assert_eq!(offer.cr4, CR4_ALWAYS.bits());
        assert_eq!(offer.efer, Efer::SCE.bits());
        assert_eq!(
            (offer.xcr0, offer.physical_bits),
            (0, DEFAULT_PHYSICAL_BITS)
        );
    }

    #[test]
    fn features_become_bits() {
        let offer = Offer::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (1, _) => CpuidResult {
                ecx: 1 << 26 | 1 << 17,
                ..Default::default()
            },
            (7, 0) => CpuidResult {
                ebx: 1 << 20,
                ..Default::default()
            },
            (0xd, 0) => CpuidResult {
                eax: 7,
                ..Default::default()
            },
            (0x8000_0000, _) => CpuidResult {
                eax: 0x8000_0008,
                ..Default::default()
            },
            (0x8000_0001, _) => CpuidResult {
                edx: 1 << 29,
                ..Default::default()
            },
            (0x8000_0008, _) => CpuidResult {
                eax: 0x3030,
                ..Default::default()
            },
            _ => CpuidResult::default(),
        });
        let extra = Cr4::PCIDE | Cr4::OSXSAVE | Cr4::SMAP;
        assert_eq!(offer.cr4, CR4_ALWAYS.union(extra).bits());
        assert_eq!(offer.efer, (Efer::SCE | Efer::LME | Efer::LMA).bits());
        assert_eq!((offer.xcr0, offer.physical_bits), (7, 48));
        assert_eq!(
            offer.instructions,
            Instructions::SMAP | Instructions::LONG_MODE
        );
    }
}
