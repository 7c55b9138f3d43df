//! The CPU itself: its state while it has never run, and the engine afterwards.

use cpu::CpuState;
use cpu::fpu::FpuState;
use cpu::system::Offer;

/// The state and, from the first run on, the engine.
#[derive(Default)]
pub(crate) struct Core {
    state: CpuState,
    fpu: FpuState,
    offer: Option<Offer>,
}

impl Core {
    /// The architectural state.
    pub(crate) fn state(&self) -> &CpuState {
        &self.state
    }

    /// The architectural state, to be changed.
    pub(crate) fn state_mut(&mut self) -> &mut CpuState {
        &mut self.state
    }

    /// Vector and x87 registers.
    pub(crate) fn fpu(&self) -> &FpuState {
        &self.fpu
    }

    /// Vector and x87 registers, to be changed.
    pub(crate) fn fpu_mut(&mut self) -> &mut FpuState {
        &mut self.fpu
    }

    /// What the guest's CPUID offers.
    pub(crate) fn set_offer(&mut self, offer: Offer) {
        self.offer = Some(offer);
    }
}
