//! Which interrupt the CPU takes next (SDM 3A, 12.8).

use super::registers::reg;
use super::{Effects, EndOfInterrupt, Lapic, Trigger};

impl Lapic {
    /// Computes PPR from TPR and the interrupt in service, and stores it.
    pub(super) fn update_ppr(&self) -> u32 {
        let task = self.page.get(reg::TASKPRI);
        let in_service = u32::from(self.page.highest(reg::ISR).unwrap_or(0));
        let ppr = if task & 0xf0 >= in_service & 0xf0 {
            task & 0xff
        } else {
            in_service & 0xf0
        };
        if self.page.get(reg::PROCPRI) != ppr {
            self.page.set(reg::PROCPRI, ppr);
        }
        ppr
    }

    /// The vector that can be taken now, if any.
    pub fn has_interrupt(&self) -> Option<u8> {
        if !self.is_hardware_enabled() {
            return None;
        }
        let ppr = self.update_ppr();
        self.page
            .highest(reg::IRR)
            .filter(|vector| u32::from(vector & 0xf0) > ppr)
    }

    /// The highest vector requested, whatever the priorities say.
    pub fn highest_request(&self) -> Option<u8> {
        self.page.highest(reg::IRR)
    }

    /// The highest vector in service.
    pub fn highest_in_service(&self) -> Option<u8> {
        self.page.highest(reg::ISR)
    }

    /// Moves the vector from requested to in service.
    pub fn acknowledge(&self, vector: u8) {
        self.page.clear_vector(reg::IRR, vector);
        self.page.set_vector(reg::ISR, vector);
        self.update_ppr();
    }

    /// Whether the vector waits, or waits for its EOI.
    pub fn has_pending_eoi(&self, vector: u8) -> bool {
        self.page.test(reg::ISR, vector) || self.page.test(reg::IRR, vector)
    }

    /// The EOI of the highest interrupt in service. Not every EOI has one.
    pub(super) fn end_of_interrupt(&self) -> Option<EndOfInterrupt> {
        let vector = self.page.highest(reg::ISR)?;
        self.page.clear_vector(reg::ISR, vector);
        self.update_ppr();
        let level = self.page.test(reg::TMR, vector);
        let trigger = if level { Trigger::Level } else { Trigger::Edge };
        Some(EndOfInterrupt { vector, trigger })
    }

    /// CR8: the upper four bits of TPR.
    pub fn task_priority(&self) -> u8 {
        ((self.page.get(reg::TASKPRI) & 0xf0) >> 4) as u8
    }

    /// `MOV CR8`.
    pub fn set_task_priority(&self, priority: u8) {
        self.set_tpr(u32::from(priority & 0xf) << 4);
    }

    /// The task priority that the guest keeps in memory.
    pub fn adopt_tpr(&self, tpr: u8) {
        if self.page.get(reg::TASKPRI) != u32::from(tpr) {
            self.set_tpr(u32::from(tpr));
        }
    }

    /// The EOI that the guest makes without a register.
    pub(crate) fn end_silently(&self) -> Effects {
        self.write_eoi()
    }

    pub(super) fn set_tpr(&self, tpr: u32) {
        self.page.set(reg::TASKPRI, tpr);
        self.notice_interrupt();
    }
}
