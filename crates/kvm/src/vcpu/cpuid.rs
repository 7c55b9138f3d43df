//! `KVM_SET_CPUID2` and what follows from it.

use cpu::system::Offer;
use kvm_bindings::kvm_cpuid_entry2;
use x86::control::Cr4;

use super::machine::{Life, Machine};
use super::{Inner, Vcpu, control};
use crate::cpuid::{Bit, Cpuid, Mirrored};
use crate::errno::Errno;
use crate::irqchip::apic::ApicFeatures;

const APIC_ENABLE: u64 = 1 << 11;

impl Vcpu {
    /// `KVM_SET_CPUID2`. Once the vCPU has run, only what is set already may be set.
    pub fn set_cpuid(&self, entries: Vec<kvm_cpuid_entry2>) -> Result<(), Errno> {
        let mut inner = self.lock();
        let mirrored = self.mirrored(&inner);
        let mut cpuid = Cpuid::new(entries)?;
        cpuid.mirror(mirrored);
        if inner.machine.life == Life::HasRun {
            return if cpuid.same_as(&inner.machine.cpuid) {
                Ok(())
            } else {
                Err(Errno::EINVAL)
            };
        }
        inner.machine.cpuid = cpuid;
        self.after_cpuid(&mut inner);
        Ok(())
    }

    /// `KVM_GET_CPUID2`.
    pub fn get_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        self.lock().machine.cpuid.entries().to_vec()
    }

    fn after_cpuid(&self, inner: &mut Inner) {
        let cpuid = &inner.machine.cpuid;
        if let Some(lapic) = self.lapic() {
            lapic.set_features(ApicFeatures {
                x2apic: cpuid.has(Bit::X2APIC),
                tsc_deadline: cpuid.has(Bit::TSC_DEADLINE),
                physical_bits: cpuid.physical_bits() as u8,
            });
        }
        let offer = offer(cpuid);
        inner.core.set_offer(offer);
    }

    fn mirrored(&self, inner: &Inner) -> Mirrored {
        let state = inner.core.state();
        Mirrored {
            os_xsave: state.cr4 & Cr4::OSXSAVE.bits() != 0,
            os_pke: state.cr4 & Cr4::PKE.bits() != 0,
            apic: self.apic_base(&inner.machine) & APIC_ENABLE != 0,
            xcr0: state.xcr0,
            no_unhalt: self.vm().halts_in_guest(),
            mwait: self.mwait_switch(&inner.machine),
        }
    }

    /// Whether `IA32_MISC_ENABLE` turns `MONITOR` and `MWAIT` on, where it is heeded.
    pub(crate) fn mwait_switch(&self, machine: &Machine) -> Option<bool> {
        let heeded = self.vm().irqchip().policy().heeds_mwait_switch();
        heeded.then(|| machine.msrs.enables_mwait())
    }

    /// Brings the bits of CPUID that mirror registers up to date, after the monitor changed them.
    pub(crate) fn mirror_cpuid(&self, inner: &mut Inner) {
        let mirrored = self.mirrored(inner);
        inner.machine.cpuid.mirror(mirrored);
    }
}

/// Which register bits and instructions this CPUID offers. Before the CPUID is given, nothing but
/// the virtual CPU itself limits CR4.
pub(crate) fn offer(cpuid: &Cpuid) -> Offer {
    let mut offer = Offer::from_cpuid(|leaf, subleaf| cpuid.query(leaf, subleaf));
    offer.cr4 = control::cr4_offered(cpuid);
    offer.efer = control::efer_offered(cpuid);
    offer.xcr0 = cpuid.xcr0() | x86::xstate::X87;
    offer
}
