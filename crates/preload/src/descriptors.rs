//! The life of a descriptor: `close`, `dup` and their kin.
//!
//! The real descriptor is closed and copied by the C library; here the registry follows.

use std::ffi::{c_int, c_uint, c_void};

use crate::inside::{Inside, is_inside};
use crate::next::next;
use crate::process;

/// A descriptor is about to be closed. In a child of `fork` the objects are the parent's: they are
/// left alone there, and the descriptor is closed like any.
fn forget(fd: c_int) {
    if is_inside() || !process::is_owner() {
        return;
    }
    let _inside = Inside::enter();
    if kvm::fds::is_known(fd) {
        kvm::fds::closed(fd);
    }
}

fn known() -> Vec<c_int> {
    if is_inside() || !process::is_owner() {
        return Vec::new();
    }
    let _inside = Inside::enter();
    kvm::fds::known()
}

fn copied(old: c_int, new: c_int) -> c_int {
    if new >= 0 && new != old && !is_inside() && process::is_owner() {
        let _inside = Inside::enter();
        if kvm::fds::is_known(old) {
            kvm::fds::opened(old, new);
        }
    }
    new
}

/// The C library's `close`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(fd: c_int) -> c_int {
    // Before the descriptor's number can be given to another thread's file.
    forget(fd);
    next!(c"close" as fn(fd: c_int) -> c_int)
}

/// The C library's `close_range`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
        for fd in known() {
            if (first..=last).contains(&fd.cast_unsigned()) {
                forget(fd);
            }
        }
    }
    next!(c"close_range" as fn(first: c_uint, last: c_uint, flags: c_int) -> c_int)
}

/// The C library's `dup`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup(old: c_int) -> c_int {
    copied(old, next!(c"dup" as fn(old: c_int) -> c_int))
}

/// The C library's `dup2`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if old != new {
        forget(new);
    }
    copied(old, next!(c"dup2" as fn(old: c_int, new: c_int) -> c_int))
}

/// The C library's `dup3`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    forget(new);
    copied(
        old,
        next!(c"dup3" as fn(old: c_int, new: c_int, flags: c_int) -> c_int),
    )
}

macro_rules! fcntls {
    ($($name:ident = $c_name:literal;)*) => {$(
        /// The C library's function of this name; variadic there, the argument in the third place.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
            let answer =
                next!($c_name as fn(fd: c_int, command: c_int, argument: *mut c_void) -> c_int);
            match command {
                libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => copied(fd, answer),
                _ => answer,
            }
        }
    )*};
}

fcntls! {
    fcntl = c"fcntl";
    fcntl64 = c"fcntl64";
}
