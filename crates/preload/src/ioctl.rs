//! `ioctl`: the API itself.

use std::ffi::{c_int, c_ulong, c_void};

use crate::fail;
use crate::inside::{Inside, is_inside};
use crate::next::next;

/// The C library's `ioctl`; variadic there, the argument in the third place.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if !is_inside() && kvm::fds::is_ours(fd) {
        let _inside = Inside::enter();
        // The C library's ioctl takes an unsigned long, the kernel the low 32 bits of it.
        if let Some(answer) = kvm::fds::ioctl(fd, request as u32, argument as u64) {
            return answer.unwrap_or_else(|e| fail(e.get()));
        }
    }
    next!(c"ioctl" as fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
}
