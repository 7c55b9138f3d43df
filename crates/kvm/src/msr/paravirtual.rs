//! KVM's own MSRs (`Documentation/virt/kvm/x86/msr.rst`).

use addr::Gpa;

use super::{Refused, index as n};
use crate::clock::memory::GuestMemory;
use crate::vcpu::{Machine, Vcpu};

/// `KVM_FEATURE_*`, a bit of leaf `0x4000_0001`.
#[derive(Clone, Copy)]
enum Feature {
    Clock = 0,
    Clock2 = 3,
    AsyncPf = 4,
    StealTime = 5,
    PvEoi = 6,
    PollControl = 12,
    AsyncPfInt = 14,
}

/// Of the register that turns on asynchronous page faults: their page is aligned to 64 bytes, and
/// two bits in between are reserved.
const ASYNC_PF_RESERVED: u64 = 0x30;
/// Bits of the steal-time register that must be zero.
const STEAL_RESERVED: u64 = 0x3e;

/// The registers of one vCPU.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    system_time: u64,
    steal_time: u64,
    pv_eoi: u64,
    async_pf: u64,
    async_pf_vector: u64,
    poll_control: u64,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            system_time: 0,
            steal_time: 0,
            pv_eoi: 0,
            async_pf: 0,
            async_pf_vector: 0,
            // The host polls before a halted vCPU sleeps, until the guest says otherwise.
            poll_control: 1,
        }
    }
}

fn feature(index: u32) -> Option<Feature> {
    Some(match index {
        n::KVM_WALL_CLOCK | n::KVM_SYSTEM_TIME => Feature::Clock,
        n::KVM_WALL_CLOCK_NEW | n::KVM_SYSTEM_TIME_NEW => Feature::Clock2,
        n::KVM_STEAL_TIME => Feature::StealTime,
        n::KVM_PV_EOI => Feature::PvEoi,
        n::KVM_ASYNC_PF => Feature::AsyncPf,
        n::KVM_ASYNC_PF_INT | n::KVM_ASYNC_PF_ACK => Feature::AsyncPfInt,
        n::KVM_POLL_CONTROL => Feature::PollControl,
        _ => return None,
    })
}

/// Whether the number is one of theirs.
pub(super) fn owns(index: u32) -> bool {
    feature(index).is_some()
}

fn need(machine: &Machine, index: u32) -> Result<(), Refused> {
    let feature = feature(index).ok_or(Refused::Unknown)?;
    let shown = machine.cpuid.paravirtual_features().unwrap_or(0);
    if machine.enforce_pv && shown >> feature as u32 & 1 == 0 {
        return Err(Refused::Unknown);
    }
    Ok(())
}

pub(super) fn read(machine: &Machine, vcpu: &Vcpu, index: u32) -> Result<u64, Refused> {
    need(machine, index)?;
    let registers = &machine.msrs.paravirtual;
    Ok(match index {
        n::KVM_WALL_CLOCK | n::KVM_WALL_CLOCK_NEW => vcpu.vm().wall_clock().raw(),
        n::KVM_SYSTEM_TIME | n::KVM_SYSTEM_TIME_NEW => registers.system_time,
        n::KVM_STEAL_TIME => registers.steal_time,
        n::KVM_PV_EOI => registers.pv_eoi,
        n::KVM_ASYNC_PF => registers.async_pf,
        n::KVM_ASYNC_PF_INT => registers.async_pf_vector,
        n::KVM_ASYNC_PF_ACK => 0,
        _ => registers.poll_control,
    })
}

pub(super) fn write(
    machine: &mut Machine,
    vcpu: &Vcpu,
    index: u32,
    value: u64,
) -> Result<(), Refused> {
    need(machine, index)?;
    let registers = &mut machine.msrs.paravirtual;
    match index {
        n::KVM_WALL_CLOCK | n::KVM_WALL_CLOCK_NEW => vcpu.vm().write_wall_clock(Gpa::new(value)),
        n::KVM_SYSTEM_TIME | n::KVM_SYSTEM_TIME_NEW => {
            registers.system_time = value;
            machine.clock_stale = true;
        }
        n::KVM_STEAL_TIME if value & STEAL_RESERVED == 0 => registers.steal_time = value,
        n::KVM_PV_EOI if value & 2 == 0 => {
            let byte = Gpa::new(value & !1);
            let missing = value & 1 != 0 && vcpu.vm().read(byte, &mut [0]).is_err();
            if missing {
                return Err(Refused::Invalid);
            }
            registers.pv_eoi = value;
        }
        // Turned on, but no page is ever announced: a vCPU waits for the host. Without a local APIC
        // it stays off.
        n::KVM_ASYNC_PF if value & ASYNC_PF_RESERVED == 0 => match vcpu.lapic() {
            Some(_) => registers.async_pf = value,
            None if value == 0 => {}
            None => return Err(Refused::Invalid),
        },
        n::KVM_ASYNC_PF_INT if value >> 8 == 0 => registers.async_pf_vector = value,
        n::KVM_ASYNC_PF_ACK => {}
        n::KVM_POLL_CONTROL if value & !1 == 0 => registers.poll_control = value,
        _ => return Err(Refused::Invalid),
    }
    Ok(())
}

impl Registers {
    /// Whether the guest's clock page is in use.
    pub(crate) fn clock_is_on(&self) -> bool {
        self.system_time & 1 != 0
    }

    /// Where the clock page is, if it is in use.
    pub(crate) fn clock_page(&self) -> Option<Gpa> {
        self.clock_is_on().then(|| Gpa::new(self.system_time & !1))
    }

    /// The byte by which the guest ends interrupts, if it does.
    pub(crate) fn eoi_byte(&self) -> Option<Gpa> {
        (self.pv_eoi & 1 != 0).then(|| Gpa::new(self.pv_eoi & !1))
    }

    /// The guest does not end interrupts by a byte any more.
    pub(crate) fn forget_eoi(&mut self) {
        self.pv_eoi = 0;
    }

    /// Whether the host may poll before a halted vCPU sleeps.
    pub(crate) fn host_may_poll(&self) -> bool {
        self.poll_control & 1 != 0
    }

    /// Where stolen time is accounted, if it is.
    pub(crate) fn steal_page(&self) -> Option<Gpa> {
        (self.steal_time & 1 != 0).then(|| Gpa::new(self.steal_time & !0x3f))
    }
}
