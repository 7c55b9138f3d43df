//! The local APIC's place in the vCPU: CR8, the APIC base, `KVM_GET_LAPIC`.
//!
//! Where the monitor has the interrupt controllers there is no local APIC here, and CR8 and the base
//! are plain registers.

use kvm_bindings::kvm_lapic_state;

use super::{Inner, Machine, Vcpu};
use crate::cpuid::Bit;
use crate::errno::Errno;
use crate::irqchip::apic::{ApicFeatures, BaseWriter, Refused as ApicRefused, check_base};
use crate::msr::Refused;

impl Vcpu {
    /// CR8.
    pub(crate) fn task_priority(&self, machine: &Machine) -> u8 {
        match self.lapic() {
            Some(lapic) => lapic.task_priority(),
            None => machine.cr8,
        }
    }

    /// `MOV CR8`.
    pub(crate) fn set_task_priority(&self, machine: &mut Machine, priority: u8) {
        match self.lapic() {
            Some(lapic) => lapic.set_task_priority(priority),
            None => machine.cr8 = priority,
        }
    }

    /// `IA32_APIC_BASE`.
    pub(crate) fn apic_base(&self, machine: &Machine) -> u64 {
        self.lapic().map_or(machine.apic_base, |lapic| lapic.base())
    }

    /// `IA32_APIC_BASE`, as `KVM_SET_SREGS` writes it.
    pub(crate) fn set_apic_base(&self, machine: &mut Machine, value: u64) -> Result<(), Errno> {
        self.write_apic_base(machine, value, BaseWriter::Monitor)
            .map_err(|ApicRefused| Errno::EINVAL)
    }

    /// Writes `IA32_APIC_BASE`.
    pub(crate) fn write_apic_base(
        &self,
        machine: &mut Machine,
        value: u64,
        writer: BaseWriter,
    ) -> Result<(), ApicRefused> {
        if let Some(lapic) = self.lapic() {
            return self.vm().irqchip().set_apic_base(lapic, value, writer);
        }
        let features = ApicFeatures {
            x2apic: machine.cpuid.has(Bit::X2APIC),
            tsc_deadline: false,
            physical_bits: machine.cpuid.physical_bits() as u8,
        };
        if !check_base(machine.apic_base, value, writer, features) {
            return Err(ApicRefused);
        }
        machine.apic_base = value;
        Ok(())
    }

    /// `WRMSR` of an x2APIC register.
    pub(crate) fn write_x2apic(&self, index: u32, value: u64) -> Result<(), Refused> {
        let lapic = self.lapic().ok_or(Refused::Invalid)?;
        let written = self.vm().irqchip().write_x2apic(lapic, index, value);
        written.map_err(|ApicRefused| Refused::Invalid)
    }

    /// The SIPI vector that `KVM_SET_VCPU_EVENTS` gives.
    pub(crate) fn set_sipi_vector(&self, vector: u32) {
        if let Some(lapic) = self.lapic() {
            lapic.set_sipi_vector(vector as u8);
        }
    }

    /// Takes over the NMIs that came by the APIC, and forgets those that don't fit (`process_nmi`).
    pub(crate) fn collect_nmis(&self, inner: &mut Inner) {
        let came = match self.lapic().filter(|lapic| lapic.has_nmis()) {
            Some(lapic) => lapic.take_nmis().min(2) as u8,
            None => 0,
        };
        if came > 0 {
            self.counters().nmi_injections.bump();
        }
        inner.add_nmis(came);
    }

    /// `KVM_GET_LAPIC`.
    pub fn get_lapic(&self) -> Result<kvm_lapic_state, Errno> {
        let _inner = self.lock();
        let lapic = self.lapic().ok_or(Errno::EINVAL)?;
        Ok(lapic.state())
    }

    /// `KVM_SET_LAPIC`.
    pub fn set_lapic(&self, state: &kvm_lapic_state) -> Result<(), Errno> {
        let _inner = self.lock();
        let lapic = self.lapic().ok_or(Errno::EINVAL)?;
        self.vm().irqchip().set_lapic(lapic, state)
    }
}

impl Inner {
    /// NMIs that wait: one in service latches one more; none in service, two.
    pub(crate) fn add_nmis(&mut self, came: u8) {
        let events = &self.core.state().events;
        let in_service = events.nmi_masked || self.machine.nmi_injected;
        let most = if in_service { 1 } else { 2 };
        let pending = events.nmi_pending.saturating_add(came).min(most);
        if pending != events.nmi_pending {
            self.core.state_mut().events.nmi_pending = pending;
        }
    }
}
