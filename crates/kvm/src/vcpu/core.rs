//! The CPU itself: plain state while it has never run, and the engine from then on.
//!
//! An engine has a code cache of tens of megabytes of address space; a vCPU that is only configured
//! needs none.

use cpu::fpu::FpuState;
use cpu::system::{GuestDebug, Offer};
use cpu::{CpuState, VcpuConfig};
use mmu::VcpuMmu;

use crate::errno::Errno;
use crate::vm::Shared;

/// Address space for translated code, of which only what is used takes memory.
const CODE_CACHE: usize = 64 << 20;

/// The state and, from the first run on, the engine.
pub(crate) struct Core {
    state: CpuState,
    fpu: FpuState,
    offer: Offer,
    debug: GuestDebug,
    engine: Option<Box<cpu::Vcpu>>,
}

impl Core {
    /// A CPU that offers this.
    pub(crate) fn new(offer: Offer) -> Self {
        Self {
            state: CpuState::default(),
            fpu: FpuState::default(),
            offer,
            debug: GuestDebug::default(),
            engine: None,
        }
    }

    /// The architectural state.
    pub(crate) fn state(&self) -> &CpuState {
        match &self.engine {
            Some(engine) => engine.state(),
            None => &self.state,
        }
    }

    /// The architectural state, to be changed.
    pub(crate) fn state_mut(&mut self) -> &mut CpuState {
        match &mut self.engine {
            Some(engine) => engine.state_mut(),
            None => &mut self.state,
        }
    }

    /// Vector and x87 registers.
    pub(crate) fn fpu(&self) -> &FpuState {
        match &self.engine {
            Some(engine) => engine.fpu(),
            None => &self.fpu,
        }
    }

    /// Vector and x87 registers, to be changed.
    pub(crate) fn fpu_mut(&mut self) -> &mut FpuState {
        match &mut self.engine {
            Some(engine) => engine.fpu_mut(),
            None => &mut self.fpu,
        }
    }

    /// What the guest's CPUID offers.
    pub(crate) fn set_offer(&mut self, offer: Offer) {
        self.offer = offer;
        if let Some(engine) = &mut self.engine {
            engine.set_offer(offer);
        }
    }

    /// What the monitor watches for.
    pub(crate) fn set_debug(&mut self, debug: GuestDebug) {
        self.debug = debug;
        if let Some(engine) = &mut self.engine {
            engine.set_guest_debug(debug);
        }
    }

    /// What the monitor watches for.
    pub(crate) fn debug(&self) -> GuestDebug {
        self.debug
    }

    /// The engine, if the vCPU has run.
    pub(crate) fn engine(&self) -> Option<&cpu::Vcpu> {
        self.engine.as_deref()
    }

    /// The engine, if the vCPU has run.
    pub(crate) fn engine_mut(&mut self) -> Option<&mut cpu::Vcpu> {
        self.engine.as_deref_mut()
    }

    /// Makes the engine for vCPU `id`; the state moves into it. `None`: it was there.
    pub(crate) fn start(&mut self, vm: &Shared, id: u32) -> Result<Option<&mut cpu::Vcpu>, Errno> {
        if self.engine.is_some() {
            return Ok(None);
        }
        let config = VcpuConfig {
            code: std::sync::Arc::clone(vm.code()),
            cache_size: CODE_CACHE,
            offer: self.offer,
            blocks: vm.settings().blocks,
        };
        let mmu = VcpuMmu::new(vm.mmu(), id);
        let mut engine = Box::new(cpu::Vcpu::new(config, mmu, vm.domain())?);
        *engine.state_mut() = self.state.clone();
        *engine.fpu_mut() = self.fpu.clone();
        engine.set_guest_debug(self.debug);
        Ok(Some(self.engine.insert(engine)))
    }
}
