//! `/dev/kvm` for programs that are not ours.
//!
//! Loaded into a program by the dynamic linker (`LD_PRELOAD`), this library answers the program's
//! calls on `/dev/kvm` and on what comes from it with the crate `kvm`, and hands every other call
//! on, unchanged, to the next library.
//!
//! | call                                   | why it is interposed                                   |
//! |----------------------------------------|--------------------------------------------------------|
//! | `open`, `openat` in all variants       | `/dev/kvm` itself, and `/sys/module/kvm*/parameters`   |
//! | `ioctl`                                | the API                                                |
//! | `close`, `dup`, `fcntl`, `close_range` | the life of a descriptor of ours                       |
//! | `sigaction`, `signal`                  | `KVM_RUN` ends with `EINTR` when a handler has run     |
//!
//! `mmap` needs nothing: a vCPU's descriptor is a memfd that holds its `kvm_run`.
//!
//! Every descriptor of ours is a real one, so that `select`, `poll`, `fstat` and passing it on do
//! what they do for any file. [`kvm::fds`] keeps what stands behind each.
#![allow(
    non_snake_case,
    reason = "the C library's own names, which this library takes"
)]
#![expect(
    unsafe_code,
    reason = "C entry points that take the calling program's pointers as the C library would"
)]

mod descriptors;
mod ioctl;
mod mapping;
mod next;
mod open;
mod parameters;
mod process;
mod settings;
mod signals;
mod stats;
mod trace;

use std::ffi::c_int;

/// Ends a C entry point with an errno: -1, and `errno` set.
fn fail(errno: c_int) -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}
