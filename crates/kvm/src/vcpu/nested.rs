//! `KVM_GET_NESTED_STATE`, `KVM_SET_NESTED_STATE` of a vCPU that offers neither VMX nor SVM: what
//! kvm.ko shows and takes with `nested=0` (`svm_get_nested_state`, `vmx_get_nested_state` and their
//! counterparts). The format is that of the host's vendor.

use kvm_bindings::{
    KVM_STATE_NESTED_EVMCS, KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_FORMAT_VMX,
    KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, KVM_STATE_NESTED_MTF_PENDING,
    KVM_STATE_NESTED_RUN_PENDING, KVM_STATE_NESTED_SVM_VMCB_SIZE, KVM_STATE_NESTED_VMX_VMCS_SIZE,
};

use super::Vcpu;
use crate::errno::Errno;

/// `struct kvm_nested_state` without the data behind it, in words.
pub(crate) const WORDS: usize = 16;
/// The same in bytes.
pub(crate) const HEADER: u32 = 8 * WORDS as u32;

const FLAGS: u32 = KVM_STATE_NESTED_RUN_PENDING
    | KVM_STATE_NESTED_GUEST_MODE
    | KVM_STATE_NESTED_EVMCS
    | KVM_STATE_NESTED_MTF_PENDING
    | KVM_STATE_NESTED_GIF_SET;
/// `hdr.vmx.vmxon_pa` and `hdr.vmx.vmcs12_pa`, where there is none.
const NOWHERE: u64 = !0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
}

fn vendor() -> Vendor {
    // "Auth" of "AuthenticAMD".
    if core::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Auth") {
        Vendor::Amd
    } else {
        Vendor::Intel
    }
}

fn format(vendor: Vendor) -> u32 {
    match vendor {
        Vendor::Amd => KVM_STATE_NESTED_FORMAT_SVM,
        Vendor::Intel => KVM_STATE_NESTED_FORMAT_VMX,
    }
}

/// Most bytes that a nested state may take (`KVM_CAP_NESTED_STATE`).
pub(crate) fn largest() -> i32 {
    let data = match vendor() {
        Vendor::Amd => KVM_STATE_NESTED_SVM_VMCB_SIZE,
        Vendor::Intel => 2 * KVM_STATE_NESTED_VMX_VMCS_SIZE,
    };
    (HEADER + data) as i32
}

impl Vcpu {
    /// `KVM_GET_NESTED_STATE`: no guest below this one; on AMD its global interrupt flag is set.
    pub fn nested_state(&self) -> [u64; WORDS] {
        let _inner = self.lock();
        let mut state = [0; WORDS];
        let flags = match vendor() {
            Vendor::Amd => KVM_STATE_NESTED_GIF_SET,
            Vendor::Intel => 0,
        };
        state[0] = u64::from(flags) | u64::from(format(vendor())) << 16 | u64::from(HEADER) << 32;
        if vendor() == Vendor::Intel {
            state[1] = NOWHERE;
            state[2] = NOWHERE;
        }
        state
    }

    /// `KVM_SET_NESTED_STATE`: nothing but that.
    pub fn set_nested_state(&self, state: &[u64; WORDS]) -> Result<(), Errno> {
        let _inner = self.lock();
        let flags = state[0] as u32 & 0xffff;
        let given = state[0] as u32 >> 16;
        let size = (state[0] >> 32) as u32;
        let (pending, below) = (KVM_STATE_NESTED_RUN_PENDING, KVM_STATE_NESTED_GUEST_MODE);
        let sound = size >= HEADER
            && flags & !FLAGS == 0
            && (flags & pending == 0 || flags & below != 0)
            && given == format(vendor());
        let empty = match vendor() {
            Vendor::Amd => flags == KVM_STATE_NESTED_GIF_SET,
            Vendor::Intel => {
                state[1] == NOWHERE && state[2] == NOWHERE && flags & !KVM_STATE_NESTED_EVMCS == 0
            }
        };
        if sound && empty {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }
}
