//! On a VM: memory, vCPUs, capabilities, clocks.

use std::os::fd::IntoRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MEMORY_ATTRIBUTES, kvm_clear_dirty_log, kvm_clock_data, kvm_create_device,
    kvm_create_guest_memfd, kvm_dirty_log, kvm_enable_cap, kvm_memory_attributes, kvm_msr_filter,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};

use crate::argument::Argument;
use crate::fds;
use crate::table::Answer;
use crate::vm::Vm;

macro_rules! set {
    ($($name:ident($structure:ty): $call:ident;)*) => {
        $(pub(crate) fn $name(vm: &Arc<Vm>, argument: Argument) -> Answer {
            let value: $structure = argument.read()?;
            vm.$call(&value).map(|()| 0)
        })*
    };
}

set! {
    set_user_memory_region(kvm_userspace_memory_region): set_user_memory_region;
    set_user_memory_region2(kvm_userspace_memory_region2): set_user_memory_region2;
    set_memory_attributes(kvm_memory_attributes): set_memory_attributes;
    get_dirty_log(kvm_dirty_log): get_dirty_log;
    clear_dirty_log(kvm_clear_dirty_log): clear_dirty_log;
    enable_cap(kvm_enable_cap): enable_cap;
    set_msr_filter(kvm_msr_filter): set_msr_filter;
    set_clock(kvm_clock_data): set_clock;
}

pub(crate) fn get_clock(vm: &Arc<Vm>, argument: Argument) -> Answer {
    argument.write(&vm.get_clock()).map(|()| 0)
}

pub(crate) fn get_stats_fd(vm: &Arc<Vm>, _: Argument) -> Answer {
    vm.stats_fd().map(|fd| i64::from(fd.into_raw_fd()))
}

/// How many entries were taken back.
pub(crate) fn reset_dirty_rings(vm: &Arc<Vm>, _: Argument) -> Answer {
    vm.reset_dirty_rings().map(i64::from)
}

pub(crate) fn create_vcpu(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let vcpu = vm.create_vcpu(argument.value())?;
    fds::open_vcpu(&vcpu).map(i64::from)
}

pub(crate) fn create_guest_memfd(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let request: kvm_create_guest_memfd = argument.read()?;
    let memory = vm.create_guest_memory(&request)?;
    fds::open_memory(&memory).map(i64::from)
}

#[expect(clippy::unnecessary_wraps, reason = "a row of the table")]
pub(crate) fn check_extension(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let capability = argument.value();
    if capability == u64::from(KVM_CAP_MEMORY_ATTRIBUTES) && !vm.is_protected() {
        return Ok(0);
    }
    Ok(i64::from(
        vm.shared().settings().check_extension(capability),
    ))
}

pub(crate) fn set_nr_mmu_pages(vm: &Arc<Vm>, argument: Argument) -> Answer {
    vm.set_nr_mmu_pages(argument.value()).map(|()| 0)
}

pub(crate) fn set_tss_addr(vm: &Arc<Vm>, argument: Argument) -> Answer {
    vm.set_tss_address(argument.value()).map(|()| 0)
}

pub(crate) fn set_identity_map_addr(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let address: u64 = argument.read()?;
    vm.set_identity_map_address(address).map(|()| 0)
}

pub(crate) fn set_boot_cpu_id(vm: &Arc<Vm>, argument: Argument) -> Answer {
    vm.set_boot_cpu_id(argument.value()).map(|()| 0)
}

pub(crate) fn set_tsc_khz(vm: &Arc<Vm>, argument: Argument) -> Answer {
    vm.set_tsc_khz(argument.value() as u32).map(|()| 0)
}

#[expect(clippy::unnecessary_wraps, reason = "a row of the table")]
pub(crate) fn get_tsc_khz(vm: &Arc<Vm>, _: Argument) -> Answer {
    Ok(i64::from(vm.tsc_khz()))
}

/// The descriptor comes back in the structure; a test makes none.
pub(crate) fn create_device(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let mut request: kvm_create_device = argument.read()?;
    if let Some(device) = vm.create_device(&request)? {
        let fd = fds::open_device(&device)?;
        request.fd = fd as u32;
        if let Err(errno) = argument.write(&request) {
            fds::close(fd);
            return Err(errno);
        }
        return Ok(0);
    }
    argument.write(&request).map(|()| 0)
}
