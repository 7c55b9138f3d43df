//! `access` and `stat` of `/dev/kvm`: programs ask before they open it.
//!
//! A machine without the device answers as one that has it, with the usual permissions. Everything
//! else goes on unchanged.

use std::ffi::{CStr, c_char, c_int, c_uint};

use kvm::signals::Call;

use crate::fail;
use crate::next::next;
use crate::open::DEV_KVM;
use crate::settings::{Accel, Settings};

/// Whether the path is `/dev/kvm` and ours to answer for.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn is_kvm(path: *const c_char) -> bool {
    if path.is_null() || Call::is_running() {
        return false;
    }
    // SAFETY: not null, so a C string by the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    path == DEV_KVM && Settings::get().accel == Accel::User
}

fn may(mode: c_int) -> c_int {
    if mode & libc::X_OK == 0 {
        0
    } else {
        fail(libc::EACCES)
    }
}

macro_rules! accesses {
    ($($name:ident[$($dir:ident)?][$($flags:ident)?] = $c_name:literal;)*) => {$(
        /// The C library's function of this name.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, mode: c_int $(, $flags: c_int)?
        ) -> c_int {
            // SAFETY: the program's path, by the C library's own contract.
            if unsafe { is_kvm(path) } {
                return may(mode);
            }
            next!($c_name as fn(
                $($dir: c_int,)? path: *const c_char, mode: c_int $(, $flags: c_int)?
            ) -> c_int)
        }
    )*};
}

accesses! {
    access[][] = c"access";
    eaccess[][] = c"eaccess";
    euidaccess[][] = c"euidaccess";
    faccessat[dir][flags] = c"faccessat";
}

/// Major and minor number of the device (`Documentation/admin-guide/devices.txt`).
const NUMBER: (c_uint, c_uint) = (10, 232);
const MODE: libc::mode_t = libc::S_IFCHR | 0o666;

/// What a machine with the device shows.
fn device() -> libc::stat {
    // SAFETY: a C structure of integers, of which zero is a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_mode = MODE;
    stat.st_nlink = 1;
    stat.st_rdev = libc::makedev(NUMBER.0, NUMBER.1);
    stat.st_blksize = 4096;
    stat
}

macro_rules! stats {
    ($($name:ident[$($dir:ident)?][$($flags:ident)?] = $c_name:literal;)*) => {$(
        /// The C library's function of this name.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            $($dir: c_int,)? path: *const c_char, stat: *mut libc::stat $(, $flags: c_int)?
        ) -> c_int {
            let answer = next!($c_name as fn(
                $($dir: c_int,)? path: *const c_char, stat: *mut libc::stat $(, $flags: c_int)?
            ) -> c_int);
            // SAFETY: the program's path and structure, by the C library's own contract.
            unsafe {
                if answer != 0 && is_kvm(path) && !stat.is_null() {
                    *stat = device();
                    return 0;
                }
            }
            answer
        }
    )*};
}

stats! {
    stat[][] = c"stat";
    stat64[][] = c"stat64";
    lstat[][] = c"lstat";
    lstat64[][] = c"lstat64";
    fstatat[dir][flags] = c"fstatat";
    fstatat64[dir][flags] = c"fstatat64";
}

/// The C library's `statx`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn statx(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    stat: *mut libc::statx,
) -> c_int {
    let answer = next!(
        c"statx"
            as fn(
                dir: c_int,
                path: *const c_char,
                flags: c_int,
                mask: c_uint,
                stat: *mut libc::statx,
            ) -> c_int
    );
    // SAFETY: the program's path and structure, by the C library's own contract.
    unsafe {
        if answer != 0 && is_kvm(path) && !stat.is_null() {
            let mut device: libc::statx = std::mem::zeroed();
            device.stx_mask = libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_NLINK;
            device.stx_mode = MODE as u16;
            device.stx_nlink = 1;
            device.stx_rdev_major = NUMBER.0;
            device.stx_rdev_minor = NUMBER.1;
            *stat = device;
            return 0;
        }
    }
    answer
}
