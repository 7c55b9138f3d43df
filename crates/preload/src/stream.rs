//! `fopen`: the C library opens files for it by an inner way that nobody can stand in.

use std::ffi::{CStr, c_char, c_int};

use crate::next::next;
use crate::open;

/// The flags of `open` that a mode of `fopen` stands for; enough of them for files of ours.
fn flags(mode: &CStr) -> c_int {
    let has = |letter| mode.to_bytes().contains(&letter);
    let access = match mode.to_bytes().first() {
        _ if has(b'+') => libc::O_RDWR,
        Some(b'r') => libc::O_RDONLY,
        _ => libc::O_WRONLY,
    };
    access | if has(b'e') { libc::O_CLOEXEC } else { 0 }
}

macro_rules! fopens {
    ($($name:ident = $c_name:literal;)*) => {$(
        /// The C library's function of this name.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C" fn $name(
            path: *const c_char, mode: *const c_char,
        ) -> *mut libc::FILE {
            // SAFETY: the program's strings, by the C library's own contract.
            unsafe {
                if !mode.is_null()
                    && let Some(fd) = open::ours(path, flags(CStr::from_ptr(mode)))
                {
                    return if fd < 0 { std::ptr::null_mut() } else { libc::fdopen(fd, mode) };
                }
            }
            next!($c_name as fn(path: *const c_char, mode: *const c_char) -> *mut libc::FILE)
        }
    )*};
}

fopens! {
    fopen = c"fopen";
    fopen64 = c"fopen64";
}
