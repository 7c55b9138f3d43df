//! What the guest and its local APIC share in guest memory, and accesses of the task priority that
//! the monitor wants to see.
//!
//! | what                        | where                        | to the guest           | from the guest        |
//! |-----------------------------|------------------------------|------------------------|-----------------------|
//! | `KVM_SET_VAPIC_ADDR`        | a word that the monitor names| TPR, ISR and IRR       | TPR                   |
//! | `MSR_KVM_PV_EOI_EN`         | a byte that the guest names  | 1: no EOI is needed    | 0: it has ended it    |
//! | `KVM_TPR_ACCESS_REPORTING`  | -                            | `KVM_EXIT_TPR_ACCESS`  | -                     |
//!
//! The word (`api.rst`, 4.42) holds TPR in its first byte, the class of the highest vector in service
//! in its second, and the highest vector requested in its fourth. A guest whose TPR accesses were
//! patched by the monitor works on it without leaving, and calls `KVM_HC_VAPIC_POLL_IRQ` where an
//! interrupt might have become deliverable.
//!
//! With a paravirtual EOI (`Documentation/virt/kvm/x86/msr.rst`) the byte is set when an interrupt is
//! in service, none is requested and nobody waits for its end. The guest clears the byte in place of
//! its EOI; we see that before the next look at the APIC, at the latest when the vCPU leaves.
//!
//! Both are brought up to date *to* the guest before it runs and after an interrupt was
//! acknowledged, *from* the guest before the APIC is asked for an interrupt and after the guest ran.

use addr::Gpa;
use cpu::MmioExit;

use super::{Inner, Machine, Vcpu};
use crate::clock::memory::GuestMemory;
use crate::errno::Errno;
use crate::irqchip::apic::ApicMode;
use crate::irqchip::apic::registers::reg;

/// An access of the task priority that the monitor is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TprAccess {
    /// The instruction.
    pub(crate) rip: u64,
    /// What it does.
    pub(crate) kind: TprAccessKind,
}

/// What is done to the task priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TprAccessKind {
    /// It is read.
    Read,
    /// It is written.
    Write,
}

impl Vcpu {
    /// Before the guest runs.
    pub(super) fn show_apic(&self, machine: &mut Machine) {
        self.offer_eoi(machine);
        self.show_vapic(machine);
    }

    /// Before the APIC is asked, and after the guest ran.
    pub(super) fn hear_apic(&self, machine: &mut Machine) {
        if machine.eoi_offered {
            self.take_eoi(machine);
        }
        self.hear_vapic(machine);
    }

    fn show_vapic(&self, machine: &Machine) {
        let (Some(lapic), Some(word)) = (self.lapic(), vapic_word(machine)) else {
            return;
        };
        let tpr = lapic.register(reg::TASKPRI) & 0xff;
        let in_service = u32::from(lapic.highest_in_service().unwrap_or(0) & 0xf0);
        let requested = u32::from(lapic.highest_request().unwrap_or(0));
        let value = tpr | in_service << 8 | requested << 24;
        // A page that has been taken away is the monitor's affair.
        let _ = self.vm().write(word, &value.to_le_bytes());
    }

    fn hear_vapic(&self, machine: &Machine) {
        let (Some(lapic), Some(word)) = (self.lapic(), vapic_word(machine)) else {
            return;
        };
        let mut tpr = [0];
        if self.vm().read(word, &mut tpr).is_ok() {
            lapic.adopt_tpr(tpr[0]);
        }
    }

    fn offer_eoi(&self, machine: &mut Machine) {
        let (Some(lapic), Some(byte)) = (self.lapic(), machine.msrs.paravirtual.eoi_byte()) else {
            return;
        };
        let Some(vector) = lapic.highest_in_service() else {
            return;
        };
        if lapic.highest_request().is_some() || self.vm().irqchip().is_eoi_awaited(lapic, vector) {
            return;
        }
        machine.eoi_offered = self.vm().write(byte, &[1]).is_ok();
    }

    fn take_eoi(&self, machine: &mut Machine) {
        machine.eoi_offered = false;
        let (Some(lapic), Some(byte)) = (self.lapic(), machine.msrs.paravirtual.eoi_byte()) else {
            return;
        };
        let mut value = [0];
        if self.vm().read(byte, &mut value).is_err() {
            return;
        }
        if value[0] & 1 == 0 {
            self.vm().irqchip().end_of_interrupt(lapic);
        } else {
            // Taken back: until it is offered anew, the guest ends its interrupts itself.
            let _ = self.vm().write(byte, &[0]);
        }
    }

    /// Whether this access is one that the monitor wants to see.
    pub(super) fn reports_tpr(&self, machine: &Machine, gpa: Gpa, bytes: usize) -> bool {
        let Some(lapic) = self.lapic().filter(|_| machine.tpr_reporting) else {
            return false;
        };
        let offset = gpa.raw().wrapping_sub(lapic.base_address());
        lapic.mode() == ApicMode::Xapic && offset == u64::from(reg::TASKPRI) && bytes <= 4
    }

    /// Does an access of the task priority that left for [`Self::reports_tpr`], to the end of its
    /// instruction. Whether that needs the monitor for something else.
    pub(super) fn do_tpr_access(&self, inner: &mut Inner, mmio: &MmioExit) -> Result<bool, Errno> {
        let lapic = self.lapic().map(|lapic| &**lapic);
        let irqchip = self.vm().irqchip();
        let len = usize::from(mmio.len);
        let mut data = mmio.write.unwrap_or([0; 8]);
        let kind = if mmio.write.is_some() {
            irqchip.write_memory(lapic, mmio.gpa, &data[..len]);
            TprAccessKind::Write
        } else {
            irqchip.read_memory(lapic, mmio.gpa, &mut data[..len]);
            TprAccessKind::Read
        };
        let Some(engine) = inner.core.engine_mut() else {
            return Ok(false);
        };
        let rip = match kind {
            TprAccessKind::Read => engine.state().rip,
            TprAccessKind::Write => engine.last_store(),
        };
        inner.machine.tpr_access = Some(TprAccess { rip, kind });
        let answer = match kind {
            TprAccessKind::Read => &data[..len],
            TprAccessKind::Write => &[],
        };
        engine.complete_mmio(answer);
        if engine.is_mid_instruction() {
            return self.finish_instruction(inner);
        }
        Ok(false)
    }
}

fn vapic_word(machine: &Machine) -> Option<Gpa> {
    (machine.vapic_address != 0).then(|| Gpa::new(machine.vapic_address))
}
