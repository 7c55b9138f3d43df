//! `KVM_GET_MP_STATE`, `KVM_SET_MP_STATE`, and what INIT and SIPI do.

use kvm_bindings::{
    KVM_MP_STATE_AP_RESET_HOLD, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state,
};

use super::reset::{Cause, reset};
use super::{Inner, Vcpu};
use crate::errno::Errno;
use crate::irqchip::apic::Reset;

impl Vcpu {
    /// `KVM_GET_MP_STATE`.
    pub fn get_mp_state(&self) -> kvm_mp_state {
        let mut inner = self.lock();
        self.accept_startup(&mut inner);
        let state = inner.machine.mp_state;
        let halted = matches!(state, KVM_MP_STATE_HALTED | KVM_MP_STATE_AP_RESET_HOLD);
        let unhalted = self.lapic().is_some_and(|lapic| lapic.is_unhalted());
        kvm_mp_state {
            mp_state: if halted && unhalted {
                KVM_MP_STATE_RUNNABLE
            } else {
                state
            },
        }
    }

    /// `KVM_SET_MP_STATE`: states other than runnable need a local APIC.
    pub fn set_mp_state(&self, state: kvm_mp_state) -> Result<(), Errno> {
        let mut inner = self.lock();
        match state.mp_state {
            KVM_MP_STATE_RUNNABLE => inner.machine.mp_state = KVM_MP_STATE_RUNNABLE,
            KVM_MP_STATE_UNINITIALIZED
            | KVM_MP_STATE_HALTED
            | KVM_MP_STATE_AP_RESET_HOLD
            | KVM_MP_STATE_INIT_RECEIVED => {
                self.lapic().ok_or(Errno::EINVAL)?;
                inner.machine.mp_state = state.mp_state;
            }
            KVM_MP_STATE_SIPI_RECEIVED => {
                let lapic = self.lapic().ok_or(Errno::EINVAL)?;
                inner.machine.mp_state = KVM_MP_STATE_INIT_RECEIVED;
                lapic.set_sipi(lapic.sipi_vector());
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// Takes INIT and SIPI from the local APIC (`kvm_apic_accept_events`).
    pub(crate) fn accept_startup(&self, inner: &mut Inner) {
        let Some(lapic) = self.lapic().filter(|lapic| lapic.has_startup_events()) else {
            return;
        };
        if lapic.take_init() {
            let signature = inner.machine.cpuid.find(1, 0).map(|leaf| leaf.eax);
            reset(inner.core.state_mut(), Cause::Init, signature);
            self.vm().irqchip().reset_apic(lapic, Reset::Init);
            inner.machine.forget_shared_apic();
            self.mirror_cpuid(inner);
            inner.machine.mp_state = if self.is_bootstrap() {
                KVM_MP_STATE_RUNNABLE
            } else {
                KVM_MP_STATE_INIT_RECEIVED
            };
        }
        if let Some(vector) = lapic.take_sipi()
            && inner.machine.mp_state == KVM_MP_STATE_INIT_RECEIVED
        {
            start_at(inner, vector);
            inner.machine.mp_state = KVM_MP_STATE_RUNNABLE;
        }
    }
}

/// Real mode, at page `vector` (SDM 3A, 10.4.3).
fn start_at(inner: &mut Inner, vector: u8) {
    let state = inner.core.state_mut();
    let cs = &mut state.segments.cs;
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    state.rip = 0;
}
