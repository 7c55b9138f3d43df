//! `mmap` of our descriptors: what the kernel refuses is refused, and what it allows is an ordinary
//! mapping of a memfd.

use std::ffi::{c_int, c_void};

use kvm::Errno;
use kvm::fds::Mapping;
use kvm::signals::Call;
use libc::{off_t, size_t};

use crate::fail;
use crate::next::next;
use crate::settings::Settings;
use crate::trace::exits;

/// Why this mapping is refused, if it is.
fn refusal(fd: c_int, mapping: &Mapping) -> Option<Errno> {
    let has_file = mapping.flags & libc::MAP_ANONYMOUS == 0;
    if !has_file || !kvm::fds::is_known(fd) || Call::is_running() {
        return None;
    }
    let _call = Call::enter();
    kvm::fds::find_object(fd).and_then(|object| kvm::fds::refuses_mapping(&object, mapping))
}

/// Remembers where a vCPU's pages may be, for those who watch.
fn note(fd: c_int, mapping: &Mapping, at: *mut c_void) {
    let file = fd >= 0 && mapping.flags & libc::MAP_ANONYMOUS == 0;
    let first = mapping.offset == 0 && at != libc::MAP_FAILED;
    if file && first && !Call::is_running() && Settings::get().watches() {
        let _call = Call::enter();
        exits::mapped(fd, at);
    }
}

macro_rules! mmaps {
    ($($name:ident = $c_name:literal;)*) => {$(
        /// The C library's function of this name.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            at: *mut c_void, len: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off_t,
        ) -> *mut c_void {
            let mapping = Mapping {
                offset: offset.cast_unsigned(),
                len: len as u64,
                protection,
                flags,
            };
            if let Some(errno) = refusal(fd, &mapping) {
                fail(errno.0);
                return libc::MAP_FAILED;
            }
            let mapped = next!($c_name as fn(
                at: *mut c_void, len: size_t, protection: c_int, flags: c_int, fd: c_int,
                offset: off_t,
            ) -> *mut c_void);
            note(fd, &mapping, mapped);
            mapped
        }
    )*};
}

mmaps! {
    mmap = c"mmap";
    mmap64 = c"mmap64";
}
