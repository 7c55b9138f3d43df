//! What `CPUID` tells a guest: the table that the monitor set, and what changes as the guest runs.
//!
//! `KVM_SET_CPUID2` gives the table; a few of its bits mirror registers (OSXSAVE, the size of the
//! XSAVE area, the APIC's enable bit). Lookups follow `arch/x86/kvm/cpuid.c`: a leaf that is out of
//! range gives the highest basic leaf on an Intel guest and zeros on an AMD one.

mod features;
mod supported;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub use features::{ARCH_CAPABILITIES, Bit, XCR0};
pub use supported::{emulated, supported};

use crate::errno::Errno;

/// KVM's features, where a monitor usually puts them.
const PARAVIRTUAL_FEATURES: u32 = 0x4000_0001;
/// Most entries of a table.
pub const MAX_ENTRIES: usize = 256;

/// The bits of the table that mirror the vCPU's registers.
#[derive(Clone, Copy, Debug)]
pub struct Mirrored {
    /// CR4.OSXSAVE.
    pub os_xsave: bool,
    /// CR4.PKE.
    pub os_pke: bool,
    /// The enable bit of `IA32_APIC_BASE`.
    pub apic: bool,
    /// XCR0.
    pub xcr0: u64,
    /// `HLT` doesn't leave the guest, so no vCPU can be woken from it by another.
    pub no_unhalt: bool,
    /// The bit of `IA32_MISC_ENABLE` that turns `MONITOR` and `MWAIT` on, where it does
    /// (`KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT` is off).
    pub mwait: Option<bool>,
}

/// One vCPU's table.
#[derive(Clone, Debug, Default)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Cpuid {
    /// A table as the monitor gives it, checked as `KVM_SET_CPUID2` does.
    pub fn new(entries: Vec<kvm_cpuid_entry2>) -> Result<Self, Errno> {
        let cpuid = Self { entries };
        let linear_bits = cpuid.find(0x8000_0008, 0).map_or(0, |e| e.eax >> 8 & 0xff);
        match linear_bits {
            0 | 48 | 57 => Ok(cpuid),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The entries, in the monitor's order.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// Whether another table says the same.
    pub fn same_as(&self, other: &Self) -> bool {
        let key = |e: &kvm_cpuid_entry2| (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx);
        self.entries
            .iter()
            .map(key)
            .eq(other.entries.iter().map(key))
    }

    /// The entry for a leaf; the subleaf counts only where the entry says so.
    pub fn find(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| matches(e, function, index))
    }

    fn find_mut(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries
            .iter_mut()
            .find(|e| matches(e, function, index))
    }

    /// Whether the guest has a feature.
    pub fn has(&self, bit: Bit) -> bool {
        let entry = self.find(bit.function, bit.index);
        entry.is_some_and(|e| bit.register.of(e) & 1 << bit.bit != 0)
    }

    /// MAXPHYADDR: 36 where the table doesn't say.
    pub fn physical_bits(&self) -> u32 {
        let leaf = self.find(0x8000_0000, 0).filter(|e| e.eax >= 0x8000_0008);
        let bits = leaf
            .and_then(|_| self.find(0x8000_0008, 0))
            .map(|e| e.eax & 0xff);
        bits.unwrap_or(36)
    }

    /// Whether the vendor is AMD or Hygon.
    pub fn is_amd(&self) -> bool {
        self.find(0, 0).is_some_and(|e| {
            let name = [e.ebx, e.edx, e.ecx];
            name == words(b"AuthenticAMD") || name == words(b"HygonGenuine")
        })
    }

    /// XCR0 bits that the guest may set.
    pub fn xcr0(&self) -> u64 {
        let entry = self.find(0xd, 0);
        entry.map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32) & XCR0
    }

    /// KVM's features for the guest, and leaf `0x4000_0000`'s place, where the table has them.
    pub fn paravirtual_features(&self) -> Option<u32> {
        let signature = words(b"KVMKVMKVM\0\0\0");
        let base = self.entries.iter().find(|e| {
            (0x4000_0000..0x4001_0000).contains(&e.function)
                && e.function.is_multiple_of(0x100)
                && [e.ebx, e.ecx, e.edx] == signature
        })?;
        self.find(base.function | 1, 0).map(|e| e.eax)
    }

    /// Brings the mirrored bits up to date.
    pub fn mirror(&mut self, registers: Mirrored) {
        if let Some(leaf) = self.find_mut(1, 0) {
            put(&mut leaf.ecx, 27, registers.os_xsave);
            put(&mut leaf.edx, 9, registers.apic);
            if let Some(on) = registers.mwait {
                put(&mut leaf.ecx, 3, on);
            }
        }
        if registers.no_unhalt
            && let Some(leaf) = self.find_mut(PARAVIRTUAL_FEATURES, 0)
        {
            put(&mut leaf.eax, 7, false);
        }
        if let Some(leaf) = self.find_mut(7, 0) {
            put(&mut leaf.ecx, 4, registers.os_pke);
        }
        if let Some(leaf) = self.find_mut(0xd, 0) {
            leaf.ebx = supported::standard_size(registers.xcr0);
        }
        if let Some(leaf) = self.find_mut(0xd, 1)
            && leaf.eax & 0b1010 != 0
        {
            leaf.ebx = supported::compacted_size(registers.xcr0);
        }
    }

    /// What the instruction answers.
    pub fn query(&self, function: u32, index: u32) -> cpu::CpuidResult {
        let entry = self.find(function, index);
        if let Some(e) = entry.or_else(|| self.out_of_range(function, index)) {
            return cpu::CpuidResult {
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            };
        }
        self.topology_default(function, index)
    }

    /// Intel answers a leaf that is out of range with the highest basic one.
    fn out_of_range(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        let basic = self.find(0, 0)?;
        if self.is_amd() {
            return None;
        }
        let class = match function {
            0x4000_0000..=0x4fff_ffff => function & 0xffff_ff00,
            0xc000_0000.. => 0xc000_0000,
            _ => function & 0x8000_0000,
        };
        match self.find(class, 0) {
            Some(class) if function <= class.eax => None,
            _ => self.find(basic.eax, index),
        }
    }

    /// Subleaves of the topology leaves that are not there still give CL and the x2APIC id.
    fn topology_default(&self, function: u32, index: u32) -> cpu::CpuidResult {
        let mut result = cpu::CpuidResult::default();
        if matches!(function, 0xb | 0x1f)
            && let Some(leaf) = self.find(function, 1)
        {
            result.ecx = index & 0xff;
            result.edx = leaf.edx;
        }
        result
    }
}

fn matches(entry: &kvm_cpuid_entry2, function: u32, index: u32) -> bool {
    entry.function == function
        && (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || entry.index == index)
}

fn put(word: &mut u32, bit: u32, value: bool) {
    *word = *word & !(1 << bit) | u32::from(value) << bit;
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    [word(0), word(4), word(8)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Cpuid {
        Cpuid::new(supported()).unwrap()
    }

    #[test]
    fn the_supported_table_has_what_an_x86_64_kernel_needs() {
        let cpuid = table();
        for bit in [
            Bit::LONG_MODE,
            Bit::NX,
            Bit::X2APIC,
            Bit::XSAVE,
            Bit::FSGSBASE,
            Bit::SMEP,
            Bit::SMAP,
            Bit::PCID,
        ] {
            assert!(cpuid.has(bit), "{bit:?}");
        }
        assert!(!cpuid.has(Bit::VMX) && !cpuid.has(Bit::SVM));
        assert_eq!(cpuid.query(7, 0).ebx >> 16 & 1, 0, "no AVX-512");
        assert_eq!(cpuid.query(0xa, 0).eax, 0, "no PMU");
        assert_ne!(cpuid.paravirtual_features(), None);
    }

    #[test]
    fn mirrors_follow_the_registers() {
        let mut cpuid = table();
        cpuid.mirror(Mirrored {
            os_xsave: true,
            os_pke: false,
            apic: false,
            xcr0: 7,
            no_unhalt: false,
            mwait: None,
        });
        assert_eq!(cpuid.query(1, 0).ecx >> 27 & 1, 1);
        assert_eq!(cpuid.query(1, 0).edx >> 9 & 1, 0);
        assert_eq!(cpuid.query(0xd, 0).ebx, 832);
        cpuid.mirror(Mirrored {
            os_xsave: false,
            os_pke: false,
            apic: true,
            xcr0: 1,
            no_unhalt: false,
            mwait: None,
        });
        assert_eq!(cpuid.query(1, 0).ecx >> 27 & 1, 0);
        assert_eq!(cpuid.query(0xd, 0).ebx, 576);
    }

    #[test]
    fn odd_linear_address_widths_are_refused() {
        let entry = |bits: u32| kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: bits << 8,
            ..Default::default()
        };
        assert!(Cpuid::new(vec![entry(48)]).is_ok());
        assert_eq!(Cpuid::new(vec![entry(50)]).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn leaves_out_of_range_follow_the_vendor() {
        let leaf = |function, eax, name: &[u8; 12]| {
            let [ebx, edx, ecx] = words(name);
            kvm_cpuid_entry2 {
                function,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        };
        let intel = vec![leaf(0, 2, b"GenuineIntel"), leaf(2, 0x77, b"????????????")];
        assert_eq!(Cpuid::new(intel).unwrap().query(0x55, 0).eax, 0x77);
        let amd = vec![leaf(0, 2, b"AuthenticAMD"), leaf(2, 0x77, b"????????????")];
        assert_eq!(Cpuid::new(amd).unwrap().query(0x55, 0).eax, 0);
    }
}
