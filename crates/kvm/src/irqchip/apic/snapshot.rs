//! `KVM_GET_LAPIC` and `KVM_SET_LAPIC` (api.rst, 4.57 and 4.58).

use std::sync::atomic::Ordering;

use kvm_bindings::kvm_lapic_state;

use crate::errno::Errno;

use super::registers::{PAGE_BYTES, reg, x2apic_ldr};
use super::{Effects, Lapic};

fn put(bytes: &mut [u8; PAGE_BYTES], register: u32, value: u32) {
    let at = register as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn word(bytes: &[u8; PAGE_BYTES], register: u32) -> u32 {
    let at = register as usize;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Lapic {
    /// The register page, with the timer's current count in it.
    ///
    /// In x2APIC mode the ID stands in bits 24 to 31, as in xAPIC mode, unless the monitor asked
    /// for `KVM_X2APIC_API_USE_32BIT_IDS`.
    pub fn state(&self) -> kvm_lapic_state {
        let mut bytes = self.page.save();
        put(&mut bytes, reg::TMCCT, self.current_count());
        if self.is_x2apic() && !self.policy.has_32bit_ids() {
            put(&mut bytes, reg::ID, self.id << 24);
        }
        kvm_lapic_state {
            regs: bytes.map(|byte| byte as i8),
        }
    }

    /// Replaces the register page. The timer goes on from the current count in it.
    pub fn set_state(&self, state: &kvm_lapic_state) -> Result<Effects, Errno> {
        let mut bytes = state.regs.map(|byte| byte as u8);
        self.set_spiv(word(&bytes, reg::SPIV));
        if self.is_x2apic() {
            self.fix_x2apic(&mut bytes)?;
        }
        self.page.restore(&bytes);
        self.set_version();
        self.update_ppr();
        self.restore_timer(word(&bytes, reg::TDCR), word(&bytes, reg::TMCCT));
        self.arbitration.store(0, Ordering::Relaxed);
        self.wake.interrupt();
        Ok(Effects::ADDRESSING)
    }

    fn fix_x2apic(&self, bytes: &mut [u8; PAGE_BYTES]) -> Result<(), Errno> {
        if self.policy.has_32bit_ids() && word(bytes, reg::ID) != self.id {
            return Err(Errno::EINVAL);
        }
        put(bytes, reg::ID, self.id);
        put(bytes, reg::LDR, x2apic_ldr(self.id));
        Ok(())
    }

    fn restore_timer(&self, tdcr: u32, tmcct: u32) {
        self.with_timer(|timer, _| timer.cancel());
        self.update_timer_mode();
        let tmict = self.page.get(reg::TMICT);
        self.with_timer(|timer, now| {
            timer.load_divide(tdcr);
            timer.restore(tmict, tmcct, now);
        });
        self.page.set(reg::TMCCT, 0);
    }
}
