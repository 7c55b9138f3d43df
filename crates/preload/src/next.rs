//! The functions that this library stands in front of.

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function of the next library in the search order, looked up at its first use.
pub(crate) struct Next {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Next {
    /// The function of this name.
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address. A C library without the function is none that a program could call it in, so
    /// this ends the process rather than return.
    pub(crate) fn address(&self) -> *mut c_void {
        let known = self.address.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a C string; RTLD_NEXT is allowed from a shared object.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        if found.is_null() {
            std::process::abort();
        }
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

/// Calls the next function of a name with a C signature.
macro_rules! next {
    ($name:literal as fn($($arg:ident: $t:ty),* $(,)?) -> $r:ty) => {{
        static NEXT: crate::next::Next = crate::next::Next::new($name);
        // SAFETY: the C library's function of this name has this signature; the arguments are the
        // calling program's own, handed on as they came.
        unsafe {
            let f: unsafe extern "C" fn($($t),*) -> $r = std::mem::transmute(NEXT.address());
            f($($arg),*)
        }
    }};
}
pub(crate) use next;
