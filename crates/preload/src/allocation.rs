//! `fallocate` of guest memory: the one call by which a program handles what it can't map.

use std::ffi::c_int;

use kvm::signals::Call;
use libc::off_t;

use crate::fail;
use crate::next::next;

/// The answer, where `fd` is one of guest memory.
pub(crate) fn ours(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> Option<c_int> {
    if !kvm::fds::is_known(fd) || Call::is_running() {
        return None;
    }
    let answer = {
        let _call = Call::enter();
        kvm::fds::fallocate(fd, mode, offset, len)?
    };
    Some(answer.map_or_else(|errno| fail(errno.0), |()| 0))
}

macro_rules! fallocates {
    ($($name:ident = $c_name:literal;)*) => {$(
        /// The C library's function of this name.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            fd: c_int, mode: c_int, offset: off_t, len: off_t,
        ) -> c_int {
            match ours(fd, mode, offset, len) {
                Some(answer) => answer,
                None => next!($c_name as fn(
                    fd: c_int, mode: c_int, offset: off_t, len: off_t,
                ) -> c_int),
            }
        }
    )*};
}

fallocates! {
    fallocate = c"fallocate";
    fallocate64 = c"fallocate64";
}
