//! Which values of the control registers `KVM_SET_SREGS` takes (`kvm_is_valid_sregs` in
//! `arch/x86/kvm/regs.c`).

use kvm_bindings::kvm_sregs;
use x86::control::{CR3_NO_FLUSH, Cr0, Cr4, Efer};

use crate::cpuid::{Bit, Cpuid};

/// Bits of CR4 that this virtual CPU has, whatever the guest's CPUID says.
pub(crate) const CR4_KNOWN: u64 = Cr4::VME.bits()
    | Cr4::PVI.bits()
    | Cr4::TSD.bits()
    | Cr4::DE.bits()
    | Cr4::PSE.bits()
    | Cr4::PAE.bits()
    | Cr4::MCE.bits()
    | Cr4::PGE.bits()
    | Cr4::PCE.bits()
    | Cr4::OSFXSR.bits()
    | Cr4::OSXMMEXCPT.bits()
    | Cr4::UMIP.bits()
    | Cr4::FSGSBASE.bits()
    | Cr4::PCIDE.bits()
    | Cr4::OSXSAVE.bits()
    | Cr4::SMEP.bits()
    | Cr4::SMAP.bits();

/// Bits of EFER that this virtual CPU has.
pub(crate) const EFER_KNOWN: u64 =
    Efer::SCE.bits() | Efer::LME.bits() | Efer::LMA.bits() | Efer::NXE.bits();

/// The features that a bit of CR4 needs in the guest's CPUID.
const CR4_NEEDS: &[(Cr4, Bit)] = &[
    (Cr4::OSXSAVE, Bit::XSAVE),
    (Cr4::SMEP, Bit::SMEP),
    (Cr4::SMAP, Bit::SMAP),
    (Cr4::FSGSBASE, Bit::FSGSBASE),
    (Cr4::UMIP, Bit::UMIP),
    (Cr4::PCIDE, Bit::PCID),
];

/// Bits of CR4 that a guest with this CPUID can set. Before the CPUID is given, nothing but the
/// virtual CPU itself limits them.
pub(crate) fn cr4_offered(cpuid: &Cpuid) -> u64 {
    if cpuid.entries().is_empty() {
        return CR4_KNOWN;
    }
    let missing = CR4_NEEDS.iter().filter(|(_, feature)| !cpuid.has(*feature));
    missing.fold(CR4_KNOWN, |bits, (cr4, _)| bits & !cr4.bits())
}

/// Bits of EFER that a guest with this CPUID can set; all, before the CPUID is given.
pub(crate) fn efer_offered(cpuid: &Cpuid) -> u64 {
    if cpuid.entries().is_empty() {
        return (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    }
    let mut bits = Efer::SCE.bits();
    if cpuid.has(Bit::LONG_MODE) {
        bits |= Efer::LME.bits() | Efer::LMA.bits();
    }
    if cpuid.has(Bit::NX) {
        bits |= Efer::NXE.bits();
    }
    bits
}

fn cr0_is_valid(cr0: Cr0) -> bool {
    cr0.bits() >> 32 == 0
        && (cr0.contains(Cr0::CD) || !cr0.contains(Cr0::NW))
        && (cr0.contains(Cr0::PE) || !cr0.contains(Cr0::PG))
}

fn cr3_is_legal(cr3: u64, physical_bits: u32) -> bool {
    let reserved = if physical_bits >= 64 {
        0
    } else {
        !0 << physical_bits
    };
    (cr3 & !CR3_NO_FLUSH) & reserved == 0 && cr3 & CR3_NO_FLUSH == 0
}

fn mode_is_consistent(sregs: &kvm_sregs, cpuid: &Cpuid) -> bool {
    let cr0 = Cr0::from_bits_retain(sregs.cr0);
    let cr4 = Cr4::from_bits_retain(sregs.cr4);
    let efer = Efer::from_bits_retain(sregs.efer);
    if efer.contains(Efer::LME) && cr0.contains(Cr0::PG) {
        cr4.contains(Cr4::PAE)
            && efer.contains(Efer::LMA)
            && cr3_is_legal(sregs.cr3, cpuid.physical_bits())
    } else {
        !efer.contains(Efer::LMA) && sregs.cs.l == 0
    }
}

/// Whether `KVM_SET_SREGS` takes these.
pub(crate) fn sregs_are_valid(sregs: &kvm_sregs, cpuid: &Cpuid) -> bool {
    mode_is_consistent(sregs, cpuid)
        && sregs.cr4 & !cr4_offered(cpuid) == 0
        && cr0_is_valid(Cr0::from_bits_retain(sregs.cr0))
        && efer_is_valid(sregs.efer, cpuid)
}

/// Whether EFER can have this value.
pub(crate) fn efer_is_valid(efer: u64, cpuid: &Cpuid) -> bool {
    efer & !EFER_KNOWN == 0 && efer & !efer_offered(cpuid) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::supported;

    fn cpuid() -> Cpuid {
        Cpuid::new(supported()).unwrap()
    }

    fn long_mode() -> kvm_sregs {
        kvm_sregs {
            cr0: (Cr0::PE | Cr0::PG | Cr0::ET).bits(),
            cr3: 0x1000,
            cr4: Cr4::PAE.bits(),
            efer: (Efer::LME | Efer::LMA).bits(),
            ..Default::default()
        }
    }

    #[test]
    fn long_mode_needs_all_its_bits() {
        assert!(sregs_are_valid(&long_mode(), &cpuid()));
        // Before a CPUID is given, only the virtual CPU itself limits EFER.
        assert!(sregs_are_valid(&long_mode(), &Cpuid::default()));
        for break_it in [
            |s: &mut kvm_sregs| s.cr4 = 0,
            |s: &mut kvm_sregs| s.efer = Efer::LME.bits(),
            |s: &mut kvm_sregs| s.efer = Efer::LMA.bits(),
            |s: &mut kvm_sregs| s.cr3 = 1 << 60,
            |s: &mut kvm_sregs| s.cr0 = Cr0::PG.bits(),
            |s: &mut kvm_sregs| s.cr0 |= 1 << 40,
            |s: &mut kvm_sregs| s.cr0 |= Cr0::NW.bits(),
            |s: &mut kvm_sregs| s.cr4 |= 1 << 13,
            |s: &mut kvm_sregs| s.efer |= 1 << 12,
        ] {
            let mut sregs = long_mode();
            break_it(&mut sregs);
            assert!(!sregs_are_valid(&sregs, &cpuid()), "{sregs:?}");
        }
    }

    #[test]
    fn without_cpuid_cr4_is_limited_by_the_cpu_alone() {
        let sregs = |cr4| kvm_sregs {
            cr4,
            ..Default::default()
        };
        assert!(sregs_are_valid(&sregs(CR4_KNOWN), &Cpuid::default()));
        assert!(!sregs_are_valid(&sregs(1 << 22), &Cpuid::default()));
    }
}
