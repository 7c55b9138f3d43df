//! A VM's file descriptor.

#![expect(
    unsafe_code,
    reason = "memory slots hand memory to the guest, and some ioctls take the raw structure"
)]

use std::ffi::c_ulong;

use addr::Gpa;
use kvm_bindings::{
    KVMIO, KvmIrqRouting, kvm_clear_dirty_log, kvm_clock_data, kvm_enable_cap, kvm_ioeventfd,
    kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_msi, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr, ioctl_iowr_nr};

use super::vcpu::KernelVcpu;
use crate::{Errno, Level, Result, Vcpu, Vm};

ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

const PAGE: u64 = 4096;

pub(super) struct KernelVm(VmFd);

impl KernelVm {
    pub(super) fn new(vm: VmFd) -> Self {
        Self(vm)
    }

    /// An ioctl that only reads `argument`.
    fn ioctl<T>(&self, request: c_ulong, argument: &T) -> Result<()> {
        // SAFETY: the request's number carries the size of `T`, and the kernel only reads it.
        match unsafe { ioctl_with_ref(&self.0, request, argument) } {
            -1 => Err(Errno::last()),
            _ => Ok(()),
        }
    }
}

impl Vm for KernelVm {
    fn check_extension(&self, capability: u32) -> i32 {
        self.0.check_extension_raw(c_ulong::from(capability))
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.0.enable_cap(cap)
    }

    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.set_user_memory_region(*region) }
    }

    fn get_dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>> {
        self.0.get_dirty_log(slot, (pages * PAGE) as usize)
    }

    fn clear_dirty_log(&self, range: &kvm_clear_dirty_log, bitmap: &[u64]) -> Result<()> {
        if (bitmap.len() as u64) * 64 < u64::from(range.num_pages) {
            return Err(Errno::new(libc::EINVAL));
        }
        let mut range = *range;
        range.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
        self.ioctl(KVM_CLEAR_DIRTY_LOG(), &range)
    }

    fn set_tss_address(&self, address: Gpa) -> Result<()> {
        self.0.set_tss_address(address.raw() as usize)
    }

    fn set_identity_map_address(&self, address: Gpa) -> Result<()> {
        self.0.set_identity_map_address(address.raw())
    }

    fn create_irqchip(&self) -> Result<()> {
        self.0.create_irq_chip()
    }

    fn get_irqchip(&self, chip: &mut kvm_irqchip) -> Result<()> {
        self.0.get_irqchip(chip)
    }

    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<()> {
        self.0.set_irqchip(chip)
    }

    fn create_pit2(&self, config: &kvm_pit_config) -> Result<()> {
        self.0.create_pit2(*config)
    }

    fn get_pit2(&self) -> Result<kvm_pit_state2> {
        self.0.get_pit2()
    }

    fn set_pit2(&self, state: &kvm_pit_state2) -> Result<()> {
        self.0.set_pit2(state)
    }

    fn set_irq_line(&self, gsi: u32, level: Level) -> Result<()> {
        self.0.set_irq_line(gsi, level == Level::High)
    }

    fn set_gsi_routing(&self, routes: &[kvm_irq_routing_entry]) -> Result<()> {
        let routing = KvmIrqRouting::from_entries(routes).map_err(|_| Errno::new(libc::E2BIG))?;
        self.0.set_gsi_routing(&routing)
    }

    fn signal_msi(&self, msi: &kvm_msi) -> Result<i32> {
        self.0.signal_msi(*msi)
    }

    fn irqfd(&self, irqfd: &kvm_irqfd) -> Result<()> {
        self.ioctl(KVM_IRQFD(), irqfd)
    }

    fn ioeventfd(&self, ioeventfd: &kvm_ioeventfd) -> Result<()> {
        self.ioctl(KVM_IOEVENTFD(), ioeventfd)
    }

    fn get_clock(&self) -> Result<kvm_clock_data> {
        self.0.get_clock()
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<()> {
        self.0.set_clock(clock)
    }

    fn create_vcpu(&self, id: u64) -> Result<Box<dyn Vcpu>> {
        let vcpu = self.0.create_vcpu(id)?;
        Ok(Box::new(KernelVcpu::new(vcpu, self.0.run_size())?))
    }
}
