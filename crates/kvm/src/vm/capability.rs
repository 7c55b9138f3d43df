//! `KVM_ENABLE_CAP` on a VM.

use std::sync::atomic::Ordering;

use kvm_bindings as kb;
use kvm_bindings::kvm_enable_cap;

use super::{Vm, read, write};
use crate::errno::Errno;
use crate::irqchip::policy::ChipMode;
use crate::table::{EXIT_HYPERCALLS, MAX_VCPU_IDS, QUIRKS};

/// Exits that `KVM_CAP_X86_DISABLE_EXITS` knows.
const DISABLE_EXITS: u64 = 0xf;

impl Vm {
    /// Whether a vCPU was made; some things can't change then.
    pub(super) fn has_vcpus(&self) -> bool {
        !read(&self.shape).vcpus.is_empty()
    }

    /// `KVM_ENABLE_CAP`.
    pub fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<(), Errno> {
        if cap.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let argument = cap.args[0];
        match cap.cap {
            kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => self.set_manual_protect(argument),
            kb::KVM_CAP_DIRTY_LOG_RING | kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                self.enable_dirty_ring(argument)
            }
            kb::KVM_CAP_HALT_POLL => {
                let ns = within(argument, u64::from(u32::MAX))?;
                self.shared.halt_poll_ns.store(ns as u32, Ordering::Relaxed);
                Ok(())
            }
            kb::KVM_CAP_DISABLE_QUIRKS2 => {
                within(argument, u64::from(QUIRKS))?;
                self.disable_quirks(argument);
                Ok(())
            }
            kb::KVM_CAP_DISABLE_QUIRKS => {
                self.disable_quirks(argument & u64::from(QUIRKS));
                Ok(())
            }
            kb::KVM_CAP_SPLIT_IRQCHIP => self.split_irqchip(argument),
            kb::KVM_CAP_X2APIC_API => self.shared.irqchip.policy().enable_x2apic_api(argument),
            kb::KVM_CAP_X86_APIC_BUS_CYCLES_NS => self.set_bus_cycle(argument),
            kb::KVM_CAP_X86_DISABLE_EXITS => {
                let exits = within(argument, DISABLE_EXITS)?;
                if exits & u64::from(kb::KVM_X86_DISABLE_EXITS_HLT) != 0 {
                    self.shared.halts_in_guest.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
            kb::KVM_CAP_MAX_VCPU_ID => self.limit_ids(argument),
            _ => self.enable_switch(cap.cap, argument),
        }
    }

    /// Those that are one value of [`super::Shared`].
    fn enable_switch(&self, cap: u32, argument: u64) -> Result<(), Errno> {
        let shared = &self.shared;
        let on = argument != 0;
        match cap {
            kb::KVM_CAP_MSR_PLATFORM_INFO => shared.platform_info.store(on, Ordering::Relaxed),
            kb::KVM_CAP_EXCEPTION_PAYLOAD => shared.exception_payload.store(on, Ordering::Relaxed),
            kb::KVM_CAP_X86_TRIPLE_FAULT_EVENT => {
                shared.triple_fault_event.store(on, Ordering::Relaxed);
            }
            kb::KVM_CAP_X86_USER_SPACE_MSR => {
                let mask = within(argument, u64::from(kb::KVM_MSR_EXIT_REASON_VALID_MASK))?;
                shared.msr_exits.store(mask as u32, Ordering::Relaxed);
            }
            kb::KVM_CAP_EXIT_HYPERCALL => {
                let mask = within(argument, u64::from(EXIT_HYPERCALLS))?;
                shared.hypercall_exits.store(mask, Ordering::Relaxed);
            }
            kb::KVM_CAP_EXIT_ON_EMULATION_FAILURE => {
                within(argument, 1)?;
                shared
                    .exit_on_emulation_failure
                    .store(on, Ordering::Relaxed);
            }
            kb::KVM_CAP_X86_BUS_LOCK_EXIT => {
                within(argument, 3)?;
                if argument == 3 {
                    return Err(Errno::EINVAL);
                }
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn disable_quirks(&self, quirks: u64) {
        let all = self.quirks.fetch_or(quirks, Ordering::Relaxed) | quirks;
        self.shared.irqchip.policy().set_disabled_quirks(all);
    }

    fn split_irqchip(&self, pins: u64) -> Result<(), Errno> {
        let shape = write(&self.shape);
        let vcpus = Self::population(&shape);
        self.shared.irqchip.create_split(pins, vcpus)
    }

    fn set_bus_cycle(&self, ns: u64) -> Result<(), Errno> {
        let longest = u64::MAX / (u64::from(u32::MAX) * 128);
        if ns == 0 || ns > longest {
            return Err(Errno::EINVAL);
        }
        let shape = write(&self.shape);
        if self.shared.irqchip.mode() == ChipMode::None {
            return Err(Errno::ENXIO);
        }
        if !shape.vcpus.is_empty() {
            return Err(Errno::EINVAL);
        }
        self.shared.irqchip.policy().set_bus_cycle_ns(ns)
    }

    fn limit_ids(&self, limit: u64) -> Result<(), Errno> {
        within_number(limit, u64::from(MAX_VCPU_IDS))?;
        let limit = limit as u32;
        let mut shape = write(&self.shape);
        if self.shared.boot_id() > limit || shape.id_limit.is_some_and(|old| old != limit) {
            return Err(Errno::EINVAL);
        }
        shape.id_limit = Some(limit);
        Ok(())
    }
}

/// A value with no bits outside `mask`.
fn within(value: u64, mask: u64) -> Result<u64, Errno> {
    if value & !mask != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(value)
}

fn within_number(value: u64, most: u64) -> Result<u64, Errno> {
    if value > most {
        return Err(Errno::EINVAL);
    }
    Ok(value)
}
