//! `KVM_GET_VCPU_EVENTS`, `KVM_SET_VCPU_EVENTS`, `KVM_INTERRUPT`, `KVM_NMI`.
//!
//! An exception is *pending* while its effects (CR2, DR6) are still to come, and *injected* once it
//! was begun. Programs that have not enabled `KVM_CAP_EXCEPTION_PAYLOAD` see one for the other.

use cpu::{Events, Exception, InjectedInterrupt};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_vcpu_events,
};
use x86::vector;

use super::{Inner, Vcpu};
use crate::errno::Errno;
use crate::irqchip::message::Level;
use crate::vm::Features;

const FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// Software exceptions are not shown: RIP still points to the instruction, which raises them again.
fn is_soft(vector: u8) -> bool {
    matches!(vector, vector::BP | vector::OF)
}

fn show_exception(shown: &mut kvm_vcpu_events, events: &Events, payloads: bool) {
    let Some(exception) = events.exception else {
        return;
    };
    let pending = !events.exception_injected;
    if !is_soft(exception.vector) {
        shown.exception.pending = u8::from(pending);
        shown.exception.injected = u8::from(!pending || !payloads);
    }
    shown.exception.nr = exception.vector;
    shown.exception.has_error_code = u8::from(exception.error_code.is_some());
    shown.exception.error_code = exception.error_code.unwrap_or(0);
    shown.exception_has_payload = u8::from(exception.payload.is_some());
    shown.exception_payload = exception.payload.unwrap_or(0);
}

fn shadow(events: &Events) -> u8 {
    let mut shadow = 0;
    if events.mov_ss_shadow {
        shadow |= KVM_X86_SHADOW_INT_MOV_SS;
    }
    if events.sti_shadow {
        shadow |= KVM_X86_SHADOW_INT_STI;
    }
    shadow as u8
}

fn show(events: &Events, features: Features) -> kvm_vcpu_events {
    let mut shown = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SMM,
        ..Default::default()
    };
    show_exception(&mut shown, events, features.exception_payload);
    if let Some(interrupt) = events.interrupt {
        shown.interrupt.injected = u8::from(!interrupt.soft);
        shown.interrupt.nr = interrupt.vector;
    }
    shown.interrupt.shadow = shadow(events);
    shown.nmi.pending = events.nmi_pending;
    shown.nmi.masked = u8::from(events.nmi_masked);
    if features.exception_payload {
        shown.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if features.triple_fault_event {
        shown.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        shown.triple_fault.pending = u8::from(events.triple_fault);
    }
    shown
}

/// An exception as given, and whether it was begun.
fn given_exception(
    given: &kvm_vcpu_events,
    features: Features,
) -> Result<Option<(Exception, bool)>, Errno> {
    let has_payloads = given.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0;
    if has_payloads && !features.exception_payload {
        return Err(Errno::EINVAL);
    }
    let pending = has_payloads && given.exception.pending != 0;
    let injected = !pending && given.exception.injected != 0;
    if !pending && !injected {
        return Ok(None);
    }
    let nr = given.exception.nr;
    if nr > 31 || nr == vector::NMI {
        return Err(Errno::EINVAL);
    }
    let has_payload = pending && given.exception_has_payload != 0;
    let exception = Exception {
        vector: nr,
        error_code: (given.exception.has_error_code != 0).then_some(given.exception.error_code),
        payload: has_payload.then_some(given.exception_payload),
    };
    Ok(Some((exception, injected)))
}

fn check_flags(given: &kvm_vcpu_events) -> Result<(), Errno> {
    if given.flags & !FLAGS != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// What kvm.ko looks at only when it has taken the rest over: system management mode, and a triple
/// fault that nobody enabled.
fn check_late(given: &kvm_vcpu_events, features: Features) -> Result<(), Errno> {
    let smi = &given.smi;
    let in_smm = smi.smm != 0 || smi.pending != 0 || smi.smm_inside_nmi != 0;
    let smm = given.flags & KVM_VCPUEVENT_VALID_SMM != 0 && in_smm;
    let triple_fault = given.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0;
    if smm || triple_fault && !features.triple_fault_event {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn take(events: &mut Events, given: &kvm_vcpu_events, exception: Option<(Exception, bool)>) {
    events.exception = exception.map(|(exception, _)| exception);
    events.exception_injected = exception.is_some_and(|(_, injected)| injected);
    events.interrupt = (given.interrupt.injected != 0).then_some(InjectedInterrupt {
        vector: given.interrupt.nr,
        soft: given.interrupt.soft != 0,
    });
    if given.flags & KVM_VCPUEVENT_VALID_SHADOW != 0 {
        let shadow = u32::from(given.interrupt.shadow);
        events.mov_ss_shadow = shadow & KVM_X86_SHADOW_INT_MOV_SS != 0;
        events.sti_shadow = shadow & KVM_X86_SHADOW_INT_STI != 0;
    }
    if given.flags & KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
        events.nmi_pending = given.nmi.pending.min(2);
    }
    events.nmi_masked = given.nmi.masked != 0;
}

impl Vcpu {
    /// `KVM_GET_VCPU_EVENTS`.
    pub fn get_vcpu_events(&self) -> kvm_vcpu_events {
        self.events_of(&mut self.lock())
    }

    /// `KVM_SET_VCPU_EVENTS`.
    pub fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        self.take_events(&mut self.lock(), events)
    }

    pub(crate) fn events_of(&self, inner: &mut Inner) -> kvm_vcpu_events {
        self.collect_nmis(inner);
        let features = self.vm().features();
        let mut shown = show(&inner.core.state().events, features);
        shown.nmi.injected = u8::from(inner.machine.nmi_injected);
        shown.smi.latched_init = u8::from(self.lapic().is_some_and(|lapic| lapic.has_init()));
        shown
    }

    pub(crate) fn take_events(
        &self,
        inner: &mut Inner,
        given: &kvm_vcpu_events,
    ) -> Result<(), Errno> {
        let features = self.vm().features();
        check_flags(given)?;
        let exception = given_exception(given, features)?;
        self.collect_nmis(inner);
        take(&mut inner.core.state_mut().events, given, exception);
        inner.machine.nmi_injected = given.nmi.injected != 0;
        if given.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
            self.set_sipi_vector(given.sipi_vector);
        }
        check_late(given, features)?;
        if given.flags & KVM_VCPUEVENT_VALID_SMM != 0
            && let Some(lapic) = self.lapic()
        {
            lapic.set_init(match given.smi.latched_init {
                0 => Level::Deassert,
                _ => Level::Assert,
            });
        }
        if given.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT != 0 {
            inner.core.state_mut().events.triple_fault = given.triple_fault.pending != 0;
        }
        Ok(())
    }

    /// `KVM_INTERRUPT`, where the monitor has the interrupt controllers; with split ones, a vector
    /// from the monitor's 8259.
    pub fn interrupt(&self, vector: u32) -> Result<(), Errno> {
        let vector = u8::try_from(vector).map_err(|_| Errno::EINVAL)?;
        if let Some(lapic) = self.lapic() {
            if self.vm().irqchip().policy().has_kernel_ioapic() {
                return Err(Errno::ENXIO);
            }
            return if lapic.set_external_vector(vector) {
                Ok(())
            } else {
                Err(Errno::EEXIST)
            };
        }
        let mut inner = self.lock();
        inner.core.state_mut().events.interrupt = Some(InjectedInterrupt {
            vector,
            soft: false,
        });
        Ok(())
    }

    /// `KVM_NMI`. As in the kernel it waits for the vCPU's lock, and so for the end of `KVM_RUN`.
    pub fn nmi(&self) {
        self.lock().add_nmis(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOADS: Features = Features {
        exception_payload: true,
        triple_fault_event: false,
    };
    const PLAIN: Features = Features {
        exception_payload: false,
        triple_fault_event: false,
    };

    fn page_fault() -> kvm_vcpu_events {
        let mut events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_PAYLOAD,
            exception_has_payload: 1,
            exception_payload: 0x1000,
            ..Default::default()
        };
        events.exception.pending = 1;
        events.exception.nr = vector::PF;
        events.exception.has_error_code = 1;
        events.exception.error_code = 2;
        events
    }

    #[test]
    fn a_pending_exception_keeps_its_payload() {
        let given = given_exception(&page_fault(), PAYLOADS).unwrap();
        let mut events = Events::default();
        take(&mut events, &page_fault(), given);
        let shown = show(&events, PAYLOADS);
        assert_eq!((shown.exception.pending, shown.exception.injected), (1, 0));
        assert_eq!(shown.exception_payload, 0x1000);
        let shown = show(&events, PLAIN);
        assert_eq!((shown.exception.pending, shown.exception.injected), (1, 1));
    }

    #[test]
    fn payloads_must_be_enabled() {
        assert_eq!(given_exception(&page_fault(), PLAIN), Err(Errno::EINVAL));
    }

    #[test]
    fn vectors_that_are_no_exceptions_are_refused() {
        for nr in [2, 32, 255] {
            let mut given = kvm_vcpu_events::default();
            given.exception.injected = 1;
            given.exception.nr = nr;
            assert_eq!(given_exception(&given, PLAIN), Err(Errno::EINVAL), "{nr}");
        }
    }

    #[test]
    fn unknown_flags_are_refused() {
        let given = |flags| kvm_vcpu_events {
            flags,
            ..Default::default()
        };
        assert!(check_flags(&given(FLAGS)).is_ok());
        for flags in [0x40, 1 << 31] {
            assert_eq!(check_flags(&given(flags)), Err(Errno::EINVAL), "{flags:#x}");
        }
        assert_eq!(check_late(&given(0x20), PLAIN), Err(Errno::EINVAL));
    }
}
