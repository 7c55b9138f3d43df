//! `KVM_GET_MSRS`, `KVM_SET_MSRS`, the TSC, machine checks, and the smaller calls about them.

use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_VCPU_TSC_OFFSET, kvm_enable_cap, kvm_msr_entry,
    kvm_x86_mce,
};
use x86::control::Cr4;
use x86::vector;

use super::machine::Life;
use super::{Inner, Vcpu};
use crate::clock::scale::Ratio;
use crate::errno::Errno;
use crate::irqchip::apic::Cmci;
use crate::irqchip::apic::registers::reg;
use crate::msr::mce::Raised;
use crate::msr::{Bus, Refused, View, Writer, index};
use crate::vm::{possible_khz, scaling};

impl Vcpu {
    fn view<'a>(&'a self, inner: &'a Inner) -> View<'a> {
        View {
            vcpu: self,
            state: inner.core.state(),
            machine: &inner.machine,
        }
    }

    fn bus<'a>(&'a self, inner: &'a mut Inner) -> Bus<'a> {
        Bus {
            vcpu: self,
            state: inner.core.state_mut(),
            machine: &mut inner.machine,
        }
    }

    /// `KVM_GET_MSRS`: fills in the values; how many before the first that can't be read, which
    /// reads as 0.
    pub fn get_msrs(&self, entries: &mut [kvm_msr_entry]) -> usize {
        let inner = self.lock();
        let view = self.view(&inner);
        let read = |entry: &mut kvm_msr_entry| {
            let value = monitor_read(&view, entry.index);
            entry.data = value.unwrap_or(0);
            value.map(drop)
        };
        entries.iter_mut().map_while(read).count()
    }

    /// `KVM_SET_MSRS`: how many were written before the first that was refused.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> usize {
        let mut inner = self.lock();
        let write = |entry: &kvm_msr_entry| {
            self.keeps_model(&inner, entry)?;
            monitor_write(&mut self.bus(&mut inner), entry)
        };
        let written = entries.iter().map_while(write).count();
        self.mirror_cpuid(&mut inner);
        written
    }

    /// What says which CPU it is can't change once the vCPU has run; the microcode's revision can.
    fn keeps_model(&self, inner: &Inner, entry: &kvm_msr_entry) -> Option<()> {
        let model = index::FEATURES.contains(&entry.index) && entry.index != index::UCODE_REV;
        if !model || inner.machine.life == Life::New {
            return Some(());
        }
        (monitor_read(&self.view(inner), entry.index)? == entry.data).then_some(())
    }

    /// `KVM_GET_TSC_KHZ`.
    pub fn tsc_khz(&self) -> u32 {
        self.lock().machine.tsc_khz
    }

    /// `KVM_SET_TSC_KHZ`: the host's TSC is scaled. 0 is the host's own frequency.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        let khz = possible_khz(khz)?;
        let mut inner = self.lock();
        self.adopt_tsc_khz(&mut inner, khz)
    }

    pub(super) fn adopt_tsc_khz(&self, inner: &mut Inner, khz: u32) -> Result<(), Errno> {
        let ratio = scaling(khz).ok_or(Errno::EINVAL)?;
        inner.machine.tsc_khz = khz;
        inner.machine.clock_stale = true;
        inner.core.state_mut().tsc_ratio = if ratio == Ratio::ONE { 0 } else { ratio.0 };
        self.tsc.set_ratio(ratio);
        self.tsc.set_khz(khz);
        Ok(())
    }

    /// Brings the TSC into line with the VM's other vCPUs; gives the offset to the scaled host's.
    pub(crate) fn synchronize_tsc(&self, value: Option<u64>) -> u64 {
        self.vm().synchronize_tsc(value, &self.tsc)
    }

    /// Tells the vCPU's clocks of a new offset.
    pub(crate) fn publish_tsc(&self, offset: u64) {
        self.tsc.set_offset(offset);
    }

    /// `KVM_VCPU_TSC_OFFSET`, the one attribute of a vCPU.
    pub fn tsc_offset(&self) -> u64 {
        self.lock().core.state().tsc_offset
    }

    /// Sets `KVM_VCPU_TSC_OFFSET`.
    pub fn set_tsc_offset(&self, offset: u64) {
        let mut inner = self.lock();
        self.vm().note_tsc_offset(offset, &self.tsc);
        inner.core.state_mut().tsc_offset = offset;
        inner.machine.clock_stale = true;
        self.publish_tsc(offset);
    }

    /// Whether a vCPU has this attribute.
    pub fn has_attribute(group: u32, attribute: u64) -> Result<(), Errno> {
        if group == kvm_bindings::KVM_VCPU_TSC_CTRL && attribute == u64::from(KVM_VCPU_TSC_OFFSET) {
            Ok(())
        } else {
            Err(Errno::ENXIO)
        }
    }

    /// `KVM_X86_SETUP_MCE`.
    pub fn set_up_mce(&self, cap: u64) -> Result<(), Errno> {
        let mut inner = self.lock();
        inner.machine.msrs.mce.set_up(cap)?;
        if let Some(lapic) = self.lapic() {
            lapic.set_cmci(if inner.machine.msrs.mce.has_cmci() {
                Cmci::Present
            } else {
                Cmci::Absent
            });
        }
        Ok(())
    }

    /// `KVM_X86_SET_MCE`.
    pub fn set_mce(&self, mce: &kvm_x86_mce) -> Result<(), Errno> {
        let mut inner = self.lock();
        let taken = inner.core.state().cr4 & Cr4::MCE.bits() != 0;
        let raised = inner.machine.msrs.mce.inject(mce, taken)?;
        let events = &mut inner.core.state_mut().events;
        match raised {
            Raised::Nothing => {}
            Raised::CorrectedInterrupt => {
                if let Some(lapic) = self.lapic() {
                    lapic.deliver_local(reg::LVTCMCI);
                }
            }
            Raised::TripleFault => events.triple_fault = true,
            Raised::MachineCheck => {
                events.exception = Some(cpu::Exception {
                    vector: vector::MC,
                    error_code: None,
                    payload: None,
                });
                events.exception_injected = false;
            }
        }
        Ok(())
    }

    /// `KVM_KVMCLOCK_CTRL`: the guest was stopped for a while. `EINVAL` where it has no clock page.
    pub fn kvmclock_ctrl(&self) -> Result<(), Errno> {
        let mut inner = self.lock();
        if !inner.machine.msrs.paravirtual.clock_is_on() {
            return Err(Errno::EINVAL);
        }
        inner.machine.paused = true;
        inner.machine.clock_stale = true;
        Ok(())
    }

    /// `KVM_ENABLE_CAP` on a vCPU.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        if cap.flags != 0 || cap.cap != KVM_CAP_ENFORCE_PV_FEATURE_CPUID {
            return Err(Errno::EINVAL);
        }
        self.lock().machine.enforce_pv = cap.args[0] != 0;
        Ok(())
    }

    /// `KVM_TPR_ACCESS_REPORTING`.
    pub fn set_tpr_reporting(&self, enabled: u32, flags: u32) -> Result<(), Errno> {
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        self.lock().machine.tpr_reporting = enabled != 0;
        Ok(())
    }

    /// `KVM_SET_VAPIC_ADDR`: needs a local APIC, and a page of guest memory.
    pub fn set_vapic_address(&self, address: u64) -> Result<(), Errno> {
        let mut inner = self.lock();
        self.lapic().ok_or(Errno::EINVAL)?;
        if address != 0 && self.vm().read_guest_u64(addr::Gpa::new(address)).is_none() {
            return Err(Errno::EINVAL);
        }
        inner.machine.vapic_address = address;
        Ok(())
    }
}

/// Registers that the monitor was told to save read as 0 where this vCPU lacks them.
fn monitor_read(view: &View<'_>, msr: u32) -> Option<u64> {
    match view.read(msr, Writer::Monitor) {
        Ok(value) => Some(value),
        Err(Refused::Unknown) if index::SAVED.contains(&msr) => Some(0),
        Err(_) => None,
    }
}

/// And zero may be written to them.
fn monitor_write(bus: &mut Bus<'_>, entry: &kvm_msr_entry) -> Option<()> {
    match bus.write(entry.index, entry.data, Writer::Monitor) {
        Ok(()) => Some(()),
        Err(Refused::Unknown) if entry.data == 0 && index::SAVED.contains(&entry.index) => Some(()),
        Err(_) => None,
    }
}
