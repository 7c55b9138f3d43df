//! The life of a descriptor: `close`, `dup` and their kin.
//!
//! The real descriptor is closed and copied by the C library; here the registry follows.

use std::ffi::{c_int, c_uint, c_void};

use kvm::signals::Call;

use crate::next::next;
use crate::process;

/// Whether `fd` is one of ours, and this process may say so: in a child of `vfork` the memory is the
/// parent's, and the descriptors are the child's own.
fn is_ours(fd: c_int) -> bool {
    kvm::fds::is_known(fd) && !Call::is_running() && process::is_owner()
}

/// A descriptor is about to be closed.
pub(crate) fn forget(fd: c_int) {
    if is_ours(fd) {
        let _call = Call::enter();
        kvm::fds::closed(fd);
    }
}

/// All descriptors of a range are about to be closed.
fn forget_range(first: c_uint, last: c_uint) {
    if Call::is_running() || !process::is_owner() {
        return;
    }
    let _call = Call::enter();
    for fd in kvm::fds::known() {
        if (first..=last).contains(&fd.cast_unsigned()) {
            kvm::fds::closed(fd);
        }
    }
}

/// `new` is a copy of `old`, or no descriptor.
pub(crate) fn copied(old: c_int, new: c_int) -> c_int {
    if new >= 0 && new != old && is_ours(old) {
        let _call = Call::enter();
        kvm::fds::opened(old, new);
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
        forget_range(first, last);
    }
    next!(c"close_range" as fn(first: c_uint, last: c_uint, flags: c_int) -> c_int)
}

/// The C library's `closefrom`.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn closefrom(first: c_int) {
    forget_range(first.max(0).cast_unsigned(), c_uint::MAX);
    next!(c"closefrom" as fn(first: c_int) -> ());
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
