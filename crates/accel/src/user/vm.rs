//! A VM of ours.
#![expect(
    unsafe_code,
    reason = "the method that gives memory to the guest is unsafe, and a union of pointers is filled in"
)]

use std::sync::Arc;

use addr::Gpa;
use kvm::irqchip::ioapic::LineStatus;
use kvm_bindings::{
    kvm_clear_dirty_log, kvm_clock_data, kvm_enable_cap, kvm_ioeventfd, kvm_irq_routing_entry,
    kvm_irqchip, kvm_irqfd, kvm_msi, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};

use super::errno;
use super::vcpu::UserVcpu;
use crate::{Level, Result, Vcpu, Vm};

pub(super) struct UserVm(Arc<kvm::Vm>);

impl UserVm {
    pub(super) fn new(vm: Arc<kvm::Vm>) -> Self {
        Self(vm)
    }
}

impl Vm for UserVm {
    fn check_extension(&self, capability: u32) -> i32 {
        kvm::table::capability(u64::from(capability))
    }

    fn enable_cap(&self, cap: &kvm_enable_cap) -> Result<()> {
        self.0.enable_cap(cap).map_err(errno)
    }

    fn mmu(&self) -> Option<Arc<mmu::Mmu>> {
        Some(Arc::clone(self.0.shared().mmu()))
    }

    unsafe fn set_user_memory_region(&self, region: &kvm_userspace_memory_region) -> Result<()> {
        self.0.set_user_memory_region(region).map_err(errno)
    }

    fn get_dirty_log(&self, slot: u32, pages: u64) -> Result<Vec<u64>> {
        let mut log = self.0.dirty_log(slot).map_err(errno)?;
        log.resize(pages.div_ceil(64) as usize, 0);
        Ok(log)
    }

    fn clear_dirty_log(&self, range: &kvm_clear_dirty_log, bitmap: &[u64]) -> Result<()> {
        let mut range = *range;
        range.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
        self.0.clear_dirty_log(&range).map_err(errno)
    }

    fn set_tss_address(&self, address: Gpa) -> Result<()> {
        self.0.set_tss_address(address.raw()).map_err(errno)
    }

    fn set_identity_map_address(&self, address: Gpa) -> Result<()> {
        self.0
            .set_identity_map_address(address.raw())
            .map_err(errno)
    }

    fn create_irqchip(&self) -> Result<()> {
        self.0.create_irqchip().map_err(errno)
    }

    fn get_irqchip(&self, chip: &mut kvm_irqchip) -> Result<()> {
        self.0.get_irqchip(chip).map_err(errno)
    }

    fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<()> {
        self.0.set_irqchip(chip).map_err(errno)
    }

    fn create_pit2(&self, config: &kvm_pit_config) -> Result<()> {
        self.0.irqchip().create_pit(config).map_err(errno)
    }

    fn get_pit2(&self) -> Result<kvm_pit_state2> {
        self.0.irqchip().pit_state2().map_err(errno)
    }

    fn set_pit2(&self, state: &kvm_pit_state2) -> Result<()> {
        self.0.irqchip().set_pit_state2(state).map_err(errno)
    }

    fn set_irq_line(&self, gsi: u32, level: Level) -> Result<()> {
        let level = u32::from(level == Level::High);
        let driven = self.0.irqchip().irq_line(gsi, level, LineStatus::Ignored);
        driven.map(drop).map_err(errno)
    }

    fn set_gsi_routing(&self, routes: &[kvm_irq_routing_entry]) -> Result<()> {
        let controllers = self.0.irqchip().controllers();
        controllers.set_routing(routes).map_err(errno)
    }

    fn signal_msi(&self, msi: &kvm_msi) -> Result<i32> {
        let controllers = self.0.irqchip().controllers();
        controllers.signal_msi(msi).map_err(errno)
    }

    fn irqfd(&self, irqfd: &kvm_irqfd) -> Result<()> {
        self.0.irqchip().irqfd(irqfd).map_err(errno)
    }

    fn ioeventfd(&self, ioeventfd: &kvm_ioeventfd) -> Result<()> {
        self.0.irqchip().ioeventfd(ioeventfd).map_err(errno)
    }

    fn get_clock(&self) -> Result<kvm_clock_data> {
        Ok(self.0.get_clock())
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<()> {
        self.0.set_clock(clock).map_err(errno)
    }

    fn create_vcpu(&self, id: u64) -> Result<Box<dyn Vcpu>> {
        let vcpu = self.0.create_vcpu(id).map_err(errno)?;
        Ok(Box::new(UserVcpu::new(&self.0, vcpu)))
    }
}
