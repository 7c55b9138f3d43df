//! `KVM_GET_DEBUGREGS`, `KVM_SET_DEBUGREGS`, `KVM_SET_GUEST_DEBUG`.

use cpu::Exception;
use cpu::system::GuestDebug;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debugregs,
    kvm_guest_debug,
};
use x86::vector;

use super::Vcpu;
use crate::errno::Errno;

impl Vcpu {
    /// `KVM_GET_DEBUGREGS`.
    pub fn get_debugregs(&self) -> kvm_debugregs {
        let inner = self.lock();
        let state = inner.core.state();
        kvm_debugregs {
            db: state.dr,
            dr6: state.dr6,
            dr7: state.dr7,
            ..Default::default()
        }
    }

    /// `KVM_SET_DEBUGREGS`: DR6 and DR7 have 32 bits.
    pub fn set_debugregs(&self, regs: &kvm_debugregs) -> Result<(), Errno> {
        if regs.flags != 0 || regs.dr6 >> 32 != 0 || regs.dr7 >> 32 != 0 {
            return Err(Errno::EINVAL);
        }
        let mut inner = self.lock();
        let state = inner.core.state_mut();
        state.dr = regs.db;
        state.dr6 = regs.dr6;
        state.dr7 = regs.dr7;
        Ok(())
    }

    /// `KVM_SET_GUEST_DEBUG`.
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<(), Errno> {
        let mut inner = self.lock();
        if debug.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) != 0 {
            let events = &mut inner.core.state_mut().events;
            let pending = events.exception.is_some() && !events.exception_injected;
            if pending || events.triple_fault {
                return Err(Errno::EBUSY);
            }
            events.exception = Some(injected(debug.control));
            events.exception_injected = false;
        }
        let on = debug.control & KVM_GUESTDBG_ENABLE != 0;
        let control = if on { debug.control } else { 0 };
        inner.machine.debug_control = control;
        inner.core.set_debug(watched(control, &debug.arch.debugreg));
        Ok(())
    }
}

fn injected(control: u32) -> Exception {
    let vector = if control & KVM_GUESTDBG_INJECT_DB != 0 {
        vector::DB
    } else {
        vector::BP
    };
    Exception {
        vector,
        error_code: None,
        payload: None,
    }
}

fn watched(control: u32, registers: &[u64; 8]) -> GuestDebug {
    let has = |flag| control & flag != 0;
    GuestDebug {
        enabled: has(KVM_GUESTDBG_ENABLE),
        single_step: has(KVM_GUESTDBG_SINGLESTEP),
        software_breakpoints: has(KVM_GUESTDBG_USE_SW_BP),
        hardware_breakpoints: has(KVM_GUESTDBG_USE_HW_BP),
        block_interrupts: has(KVM_GUESTDBG_BLOCKIRQ),
        dr: [registers[0], registers[1], registers[2], registers[3]],
        dr7: registers[7],
    }
}
