//! The kernel's KVM, through `/dev/kvm`: each call of the traits is one ioctl.

mod run;
mod vcpu;
mod vm;

use std::{ffi::c_ulong, sync::Arc};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, MsrList};
use kvm_ioctls::Kvm;

use crate::{Accelerator, Kind, Result, Vm, choice::Opened, detect::KernelKvm};

/// Opens `/dev/kvm`; where that fails, a sentence that says why.
pub fn open() -> Opened {
    match Kvm::new() {
        Ok(kvm) => Ok(Arc::new(Kernel(kvm))),
        Err(_) => Err(KernelKvm::probe().describe()),
    }
}

struct Kernel(Kvm);

impl Accelerator for Kernel {
    fn kind(&self) -> Kind {
        Kind::Kernel
    }

    fn check_extension(&self, capability: u32) -> i32 {
        self.0.check_extension_raw(c_ulong::from(capability))
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
    }

    fn msr_index_list(&self) -> Result<MsrList> {
        self.0.get_msr_index_list()
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        Ok(Arc::new(vm::KernelVm::new(self.0.create_vm()?)))
    }
}
