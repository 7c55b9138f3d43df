//! A vCPU's file descriptor.

#![expect(
    unsafe_code,
    reason = "KVM_SET_XSAVE, KVM_GET_SREGS2 and KVM_INTERRUPT need the raw calls"
)]

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use addr::Gva;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVMIO, Msrs, kvm_debugregs, kvm_enable_cap, kvm_fpu,
    kvm_guest_debug, kvm_interrupt, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_translation, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref},
    ioctl_ior_nr, ioctl_iow_nr,
};

use super::run::RunPage;
use crate::{Errno, Exit, Kicker, Level, Result, Vcpu, loaded_pdptrs};

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);

pub(super) struct KernelVcpu {
    fd: VcpuFd,
    page: Arc<RunPage>,
    /// The vCPU thread's own way to the page. It maps the same memory as `page`.
    own: RunPage,
}

impl KernelVcpu {
    pub(super) fn new(fd: VcpuFd, run_size: usize) -> Result<Self> {
        // SAFETY: the descriptor is open, and borrowed for no longer than `fd` lives.
        let raw = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let page = Arc::new(RunPage::map(raw, run_size)?);
        let own = RunPage::map(raw, run_size)?;
        Ok(Self { fd, page, own })
    }
}

impl Vcpu for KernelVcpu {
    fn run(&mut self) -> Result<Exit<'_>> {
        self.page.enter();
        let outcome = self.fd.run().map(|_| ());
        self.page.leave();
        match outcome.map_err(|e: kvm_ioctls::Error| e.errno()) {
            Ok(()) => Ok(self.own.exit()),
            Err(libc::EINTR | libc::EAGAIN) => {
                self.page.forget_kick();
                Ok(Exit::Interrupted)
            }
            Err(errno) => Err(Errno::new(errno)),
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.page.clone()
    }

    fn request_interrupt_window(&mut self, request: Level) {
        self.own
            .set_interrupt_window(u8::from(request == Level::High));
    }

    fn ready_for_interrupt(&self) -> bool {
        self.own.ready_for_interrupt()
    }

    fn get_regs(&self) -> Result<kvm_regs> {
        self.fd.get_regs()
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd.set_regs(regs)
    }

    fn get_sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs()
    }

    fn pdptrs(&self) -> Option<[u64; 4]> {
        let mut sregs = kvm_sregs2::default();
        // SAFETY: the call fills in the structure, or fails.
        let done = unsafe { ioctl_with_mut_ref(&self.fd, KVM_GET_SREGS2(), &mut sregs) };
        loaded_pdptrs(&sregs).filter(|_| done == 0)
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs)
    }

    fn get_fpu(&self) -> Result<kvm_fpu> {
        self.fd.get_fpu()
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.fd.set_fpu(fpu)
    }

    fn get_xsave(&self) -> Result<kvm_xsave> {
        self.fd.get_xsave()
    }

    fn set_xsave(&self, xsave: &kvm_xsave) -> Result<()> {
        // SAFETY: the structure holds all that the kernel reads as long as no feature with a
        // larger state was enabled by arch_prctl, and nothing here enables one.
        unsafe { self.fd.set_xsave(xsave) }
    }

    fn get_xcrs(&self) -> Result<kvm_xcrs> {
        self.fd.get_xcrs()
    }

    fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<()> {
        self.fd.set_xcrs(xcrs)
    }

    fn get_debugregs(&self) -> Result<kvm_debugregs> {
        self.fd.get_debug_regs()
    }

    fn set_debugregs(&self, regs: &kvm_debugregs) -> Result<()> {
        self.fd.set_debug_regs(regs)
    }

    fn get_msrs(&self, msrs: &mut [kvm_msr_entry]) -> Result<usize> {
        let mut list = Msrs::from_entries(msrs).map_err(|_| Errno::new(libc::E2BIG))?;
        let read = self.fd.get_msrs(&mut list)?;
        msrs.copy_from_slice(list.as_slice());
        Ok(read)
    }

    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize> {
        let list = Msrs::from_entries(msrs).map_err(|_| Errno::new(libc::E2BIG))?;
        self.fd.set_msrs(&list)
    }

    fn get_cpuid(&self) -> Result<CpuId> {
        self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
    }

    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid)
    }

    fn get_vcpu_events(&self) -> Result<kvm_vcpu_events> {
        self.fd.get_vcpu_events()
    }

    fn set_vcpu_events(&self, events: &kvm_vcpu_events) -> Result<()> {
        self.fd.set_vcpu_events(events)
    }

    fn get_mp_state(&self) -> Result<kvm_mp_state> {
        self.fd.get_mp_state()
    }

    fn set_mp_state(&self, state: kvm_mp_state) -> Result<()> {
        self.fd.set_mp_state(state)
    }

    fn get_lapic(&self) -> Result<kvm_lapic_state> {
        self.fd.get_lapic()
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd.set_lapic(lapic)
    }

    fn interrupt(&self, vector: u8) -> Result<()> {
        let interrupt = kvm_interrupt {
            irq: u32::from(vector),
        };
        // SAFETY: the kernel reads a structure of the size that the request's number carries.
        match unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) } {
            -1 => Err(Errno::last()),
            _ => Ok(()),
        }
    }

    fn nmi(&self) -> Result<()> {
        self.fd.nmi()
    }

    fn translate(&self, gva: Gva) -> Result<kvm_translation> {
        self.fd.translate_gva(gva.raw())
    }

    fn set_guest_debug(&self, debug: &kvm_guest_debug) -> Result<()> {
        self.fd.set_guest_debug(debug)
    }

    fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz()
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.fd.enable_cap(cap)
    }
}
