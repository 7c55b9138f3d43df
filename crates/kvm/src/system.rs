//! `/dev/kvm`: what can be asked before there is a VM.

use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SMALLER_MAXPHYADDR, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM,
    kvm_cpuid_entry2,
};

use crate::cpuid::{self, XCR0};
use crate::errno::Errno;
use crate::msr::index;
use crate::table;
use crate::vm::{Kind, Vm};
use cpu::BlockLength;
use mmu::{LargePages, PagingPath};

/// What can be chosen for all VMs of a [`System`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// The tables between guest and host addresses.
    pub paging: PagingPath,
    /// What decides on the size of the second level's entries.
    pub large_pages: LargePages,
    /// How much code is translated at a time.
    pub blocks: BlockLength,
}

impl Settings {
    /// `KVM_CHECK_EXTENSION` where the settings matter.
    pub(crate) fn check_extension(self, capability: u64) -> i32 {
        if capability == u64::from(KVM_CAP_SMALLER_MAXPHYADDR) {
            // As kvm_amd's: programs take it for a word on how such faults come about.
            return i32::from(self.paging == PagingPath::Shadow);
        }
        table::capability(capability)
    }
}

impl From<PagingPath> for Settings {
    fn from(paging: PagingPath) -> Self {
        Self {
            paging,
            ..Self::default()
        }
    }
}

/// KVM in user space.
#[derive(Debug, Default)]
pub struct System {
    settings: Settings,
}

impl System {
    /// One whose VMs have these settings; a paging path alone is enough.
    pub fn new(settings: impl Into<Settings>) -> Arc<Self> {
        Arc::new(Self {
            settings: settings.into(),
        })
    }

    /// `KVM_GET_API_VERSION`.
    pub fn api_version(&self) -> u32 {
        KVM_API_VERSION
    }

    /// `KVM_CREATE_VM`: the default type, and protected by software.
    pub fn create_vm(&self, kind: u64) -> Result<Arc<Vm>, Errno> {
        const DEFAULT: u64 = KVM_X86_DEFAULT_VM as u64;
        const PROTECTED: u64 = KVM_X86_SW_PROTECTED_VM as u64;
        let kind = match kind {
            DEFAULT => Kind::Default,
            PROTECTED => Kind::Protected,
            _ => return Err(Errno::EINVAL),
        };
        Vm::new(self.settings, kind).map(Arc::new)
    }

    /// `KVM_CHECK_EXTENSION`.
    pub fn check_extension(&self, capability: u64) -> i32 {
        self.settings.check_extension(capability)
    }

    /// `KVM_GET_SUPPORTED_CPUID`.
    pub fn supported_cpuid(&self) -> &'static [kvm_cpuid_entry2] {
        static TABLE: OnceLock<Vec<kvm_cpuid_entry2>> = OnceLock::new();
        TABLE.get_or_init(cpuid::supported)
    }

    /// `KVM_GET_EMULATED_CPUID`.
    pub fn emulated_cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        cpuid::emulated()
    }

    /// `KVM_GET_MSR_INDEX_LIST`.
    pub fn msr_index_list(&self) -> &'static [u32] {
        index::SAVED
    }

    /// `KVM_GET_MSR_FEATURE_INDEX_LIST`.
    pub fn msr_feature_index_list(&self) -> &'static [u32] {
        index::FEATURES
    }

    /// `KVM_GET_MSRS` without a vCPU.
    pub fn feature_msr(&self, msr: u32) -> Option<u64> {
        index::feature(msr)
    }

    /// `KVM_X86_GET_MCE_CAP_SUPPORTED`.
    pub fn mce_cap_supported(&self) -> u64 {
        crate::msr::mce::SUPPORTED
    }

    /// The attributes of `KVM_GET_DEVICE_ATTR`: `KVM_X86_XCOMP_GUEST_SUPP`, the XCR0 bits that a
    /// guest can have.
    pub fn attribute(&self, group: u32, attribute: u64) -> Result<u64, Errno> {
        match (group, attribute) {
            (0, 0) => Ok(XCR0),
            _ => Err(Errno::ENXIO),
        }
    }
}
