//! KVM in user space: the crate `kvm` behind the traits.

use std::sync::Arc;

use kvm::System;
use kvm_bindings::{CpuId, MsrList};

use crate::choice::{Kind, Opened};
use crate::detect::user::UserSupport;
use crate::{Accelerator, Errno, Result, Vm};

mod vcpu;
mod vm;

use vm::UserVm;

/// How the `user` accelerator works.
pub use kvm::Settings as Config;

/// Opens it; where it can't run on this host, a sentence that says why.
pub fn open(config: Config) -> Opened {
    if let Some(missing) = UserSupport::probe().missing() {
        return Err(missing);
    }
    Ok(Arc::new(User {
        system: System::new(config),
    }))
}

/// A vCPU of a VM that was made elsewhere in this process.
pub fn adopt(vm: &Arc<kvm::Vm>, vcpu: Arc<kvm::Vcpu>) -> Box<dyn crate::Vcpu> {
    Box::new(vcpu::UserVcpu::new(vm, vcpu))
}

/// The seam's errno for ours.
fn errno(errno: kvm::Errno) -> Errno {
    Errno::new(errno.0)
}

/// The seam's errno for a list that is too long for its wrapper.
fn too_long<E>(_: E) -> Errno {
    Errno::new(libc::E2BIG)
}

struct User {
    system: Arc<System>,
}

impl Accelerator for User {
    fn kind(&self) -> Kind {
        Kind::User
    }

    fn check_extension(&self, capability: u32) -> i32 {
        kvm::table::capability(u64::from(capability))
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        CpuId::from_entries(self.system.supported_cpuid()).map_err(too_long)
    }

    fn msr_index_list(&self) -> Result<MsrList> {
        MsrList::from_entries(self.system.msr_index_list()).map_err(too_long)
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        let vm = self.system.create_vm(0).map_err(errno)?;
        Ok(Arc::new(UserVm::new(vm)))
    }
}
