//! `open` in all its variants.

use std::ffi::{CStr, c_char, c_int, c_uint};

use kvm::signals::Call;

use crate::next::next;
use crate::settings::{Accel, Settings};
use crate::{fail, parameters, process, seccomp};

pub(crate) const DEV_KVM: &CStr = c"/dev/kvm";

/// What we answer to an open of this path ourselves.
///
/// # Safety
/// `path` is null or a C string.
pub(crate) unsafe fn ours(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() || Call::is_running() {
        return None;
    }
    // SAFETY: not null, so a C string by the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    let _call = Call::enter();
    let settings = Settings::get();
    if settings.accel == Accel::Kernel {
        return None;
    }
    if path != DEV_KVM {
        return parameters::open(path, flags);
    }
    Some(open_system(settings, flags))
}

fn open_system(settings: Settings, flags: c_int) -> c_int {
    if let Some(calls) = seccomp::forbidden() {
        seccomp::complain(&calls, "/dev/kvm does not open");
        return fail(libc::EACCES);
    }
    process::note_owner();
    match kvm::fds::open_system(&kvm::System::new(settings.of_vms())) {
        Ok(fd) => {
            if flags & libc::O_CLOEXEC == 0 {
                // SAFETY: a new descriptor of ours, made close-on-exec.
                unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
            }
            fd
        }
        Err(errno) => fail(errno.0),
    }
}

macro_rules! opens {
    ($($name:ident($($dir:ident: c_int,)?) = $c_name:literal;)*) => {$(
        /// The C library's function of this name; variadic there, the mode in the third place.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, flags: c_int, mode: c_uint,
        ) -> c_int {
            // SAFETY: the program's path, by the C library's own contract.
            if let Some(fd) = unsafe { ours(path, flags) } {
                return fd;
            }
            next!($c_name as fn(
                $($dir: c_int,)? path: *const c_char, flags: c_int, mode: c_uint,
            ) -> c_int)
        }
    )*};
}

opens! {
    open() = c"open";
    open64() = c"open64";
    openat(dir: c_int,) = c"openat";
    openat64(dir: c_int,) = c"openat64";
}

macro_rules! fortified_opens {
    ($($name:ident($($dir:ident: c_int,)?) = $c_name:literal;)*) => {$(
        /// The C library's function of this name, which programs built with `_FORTIFY_SOURCE` call.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, flags: c_int,
        ) -> c_int {
            // SAFETY: the program's path, by the C library's own contract.
            if let Some(fd) = unsafe { ours(path, flags) } {
                return fd;
            }
            next!($c_name as fn($($dir: c_int,)? path: *const c_char, flags: c_int) -> c_int)
        }
    )*};
}

fortified_opens! {
    __open_2() = c"__open_2";
    __open64_2() = c"__open64_2";
    __openat_2(dir: c_int,) = c"__openat_2";
    __openat64_2(dir: c_int,) = c"__openat64_2";
}
