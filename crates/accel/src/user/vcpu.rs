//! A vCPU of ours.
#![expect(unsafe_code, reason = "exits are read from the kvm_run pages")]

use std::sync::Arc;

use addr::Gva;
use kvm_bindings::{
    CpuId, kvm_debugregs, kvm_enable_cap, kvm_fpu, kvm_guest_debug, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_translation, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::{errno, too_long};
use crate::{Exit, Kicker, Level, Result, TlbEntry, Vcpu, decode, loaded_pdptrs};

pub(super) struct UserVcpu {
    /// A vCPU's VM lives as long as it.
    _vm: Arc<kvm::Vm>,
    vcpu: Arc<kvm::Vcpu>,
}

impl UserVcpu {
    pub(super) fn new(vm: &Arc<kvm::Vm>, vcpu: Arc<kvm::Vcpu>) -> Self {
        Self {
            _vm: Arc::clone(vm),
            vcpu,
        }
    }
}

struct UserKicker(Arc<kvm::vcpu::Kicker>);

impl Kicker for UserKicker {
    fn kick(&self) {
        self.0.kick();
    }
}

impl Vcpu for UserVcpu {
    fn run(&mut self) -> Result<Exit<'_>> {
        match self.vcpu.run() {
            Ok(()) => {
                let page = self.vcpu.run_page();
                // SAFETY: the pages live as long as the vCPU, which is borrowed for the exit's life;
                // `&mut self` keeps others from this one's exits.
                Ok(unsafe { decode(page.as_ptr(), kvm::vcpu::MMAP_SIZE) })
            }
            Err(kvm::Errno::EINTR | kvm::Errno::EAGAIN) => Ok(Exit::Interrupted),
            Err(other) => Err(errno(other)),
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(UserKicker(Arc::clone(self.vcpu.kicker())))
    }

    fn request_interrupt_window(&mut self, request: Level) {
        self.vcpu
            .run_page()
            .request_interrupt_window(u8::from(request == Level::High));
    }

    fn ready_for_interrupt(&self) -> bool {
        self.vcpu.run_page().is_ready_for_interrupt()
    }

    fn get_regs(&self) -> Result<kvm_regs> {
        Ok(self.vcpu.get_regs())
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.vcpu.set_regs(regs);
        Ok(())
    }

    fn get_sregs(&self) -> Result<kvm_sregs> {
        Ok(self.vcpu.get_sregs())
    }

    fn pdptrs(&self) -> Option<[u64; 4]> {
        loaded_pdptrs(&self.vcpu.get_sregs2())
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.vcpu.set_sregs(sregs).map_err(errno)
    }

    fn get_fpu(&self) -> Result<kvm_fpu> {
        Ok(self.vcpu.get_fpu())
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.vcpu.set_fpu(fpu);
        Ok(())
    }

    fn get_xsave(&self) -> Result<kvm_xsave> {
        Ok(self.vcpu.get_xsave())
    }

    fn set_xsave(&self, xsave: &kvm_xsave) -> Result<()> {
        self.vcpu.set_xsave(xsave).map_err(errno)
    }

    fn get_xcrs(&self) -> Result<kvm_xcrs> {
        Ok(self.vcpu.get_xcrs())
    }

    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()> {
        self.vcpu.set_xcrs(xcrs).map_err(errno)
    }

    fn get_debugregs(&self) -> Result<kvm_debugregs> {
        Ok(self.vcpu.get_debugregs())
    }

    fn set_debugregs(&self, regs: &kvm_debugregs) -> Result<()> {
        self.vcpu.set_debugregs(regs).map_err(errno)
    }

    fn get_msrs(&self, msrs: &mut [kvm_msr_entry]) -> Result<usize> {
        Ok(self.vcpu.get_msrs(msrs))
    }

    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize> {
        Ok(self.vcpu.set_msrs(msrs))
    }

    fn get_cpuid(&self) -> Result<CpuId> {
        CpuId::from_entries(&self.vcpu.get_cpuid()).map_err(too_long)
    }

    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        let entries = cpuid.as_slice().to_vec();
        self.vcpu.set_cpuid(entries).map_err(errno)
    }

    fn get_vcpu_events(&self) -> Result<kvm_vcpu_events> {
        Ok(self.vcpu.get_vcpu_events())
    }

    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<()> {
        self.vcpu.set_vcpu_events(events).map_err(errno)
    }

    fn get_mp_state(&self) -> Result<kvm_mp_state> {
        Ok(self.vcpu.get_mp_state())
    }

    fn set_mp_state(&self, state: kvm_mp_state) -> Result<()> {
        self.vcpu.set_mp_state(state).map_err(errno)
    }

    fn get_lapic(&self) -> Result<kvm_lapic_state> {
        self.vcpu.get_lapic().map_err(errno)
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.vcpu.set_lapic(lapic).map_err(errno)
    }

    fn interrupt(&self, vector: u8) -> Result<()> {
        self.vcpu.interrupt(u32::from(vector)).map_err(errno)
    }

    fn nmi(&self) -> Result<()> {
        self.vcpu.nmi();
        Ok(())
    }

    fn translate(&self, gva: Gva) -> Result<kvm_translation> {
        Ok(self.vcpu.translate(gva))
    }

    fn tlb(&self, gva: Gva, privilege: mmu::Privilege) -> Option<Option<TlbEntry>> {
        let entry = self.vcpu.tlb(gva, privilege);
        Some(entry.map(|entry| TlbEntry {
            hva: entry.hva,
            read: entry.read,
            write: entry.write,
        }))
    }

    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<()> {
        self.vcpu.set_guest_debug(debug).map_err(errno)
    }

    fn tsc_khz(&self) -> Result<u32> {
        Ok(self.vcpu.tsc_khz())
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.vcpu.enable_cap(cap).map_err(errno)
    }
}
