//! `/sys/module/kvm*/parameters`: what programs read there of a KVM that is a kernel module.

use std::ffi::{CStr, c_int};

use kvm::PagingPath;

use crate::settings::Settings;

/// Module, parameter, and what a read gives (kvm.ko's names; the values say what our KVM
/// does).
const PARAMETERS: &[(&str, &str, &str)] = &[
    ("kvm", "eager_page_split", "Y\n"),
    ("kvm", "enable_pmu", "N\n"),
    ("kvm", "enable_vmware_backdoor", "N\n"),
    ("kvm", "force_emulation_prefix", "0\n"),
    ("kvm", "halt_poll_ns", "0\n"),
    ("kvm", "ignore_msrs", "N\n"),
    ("kvm", "nx_huge_pages", "N\n"),
    ("kvm", "report_ignored_msrs", "Y\n"),
    // No AVIC: the interrupt controllers are software.
    ("kvm_amd", "avic", "N\n"),
    ("kvm_intel", "enable_apicv", "N\n"),
];

/// Those by which programs ask for nested paging (the names in `kvm_amd` and `kvm_intel`).
const NESTED: &[(&str, &str)] = &[("kvm", "tdp_mmu"), ("kvm_amd", "npt"), ("kvm_intel", "ept")];

/// A descriptor from which the parameter at `path` reads, if it is one.
pub(crate) fn open(path: &CStr, flags: c_int) -> Option<c_int> {
    let (module, name) = path
        .to_str()
        .ok()?
        .strip_prefix("/sys/module/")?
        .split_once("/parameters/")?;
    if NESTED.contains(&(module, name)) {
        let nested = Settings::get().paging == PagingPath::Nested;
        return memory_file(if nested { b"Y\n" } else { b"N\n" }, flags);
    }
    let (_, _, value) = PARAMETERS
        .iter()
        .find(|(m, n, _)| *m == module && *n == name)?;
    memory_file(value.as_bytes(), flags)
}

fn memory_file(content: &[u8], flags: c_int) -> Option<c_int> {
    let cloexec = if flags & libc::O_CLOEXEC == 0 {
        0
    } else {
        libc::MFD_CLOEXEC
    };
    // SAFETY: the name is a C string; the content is readable for its length; the descriptor is
    // ours until it is returned.
    unsafe {
        let fd = libc::memfd_create(c"kvm-parameter".as_ptr(), cloexec);
        if fd < 0 {
            return None;
        }
        libc::pwrite(fd, content.as_ptr().cast(), content.len(), 0);
        Some(fd)
    }
}
