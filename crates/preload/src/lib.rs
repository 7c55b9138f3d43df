//! `/dev/kvm` for programs that are not ours.
//!
//! Loaded into a program by the dynamic linker (`LD_PRELOAD`), this library answers the program's
//! calls on `/dev/kvm` and on what comes from it with the crate `kvm`, and hands every other call
//! on, unchanged, to the next library.
//!
//! | call                                   | why it is interposed                                   |
//! |----------------------------------------|--------------------------------------------------------|
//! | `open`, `openat`, `fopen`              | `/dev/kvm` itself, and `/sys/module/kvm*/parameters`   |
//! | `access`, `stat` and their kin         | programs look whether there is a `/dev/kvm`            |
//! | `ioctl`                                | the API                                                |
//! | `mmap`                                 | what the kernel refuses of a vCPU's pages              |
//! | `fallocate`                            | guest memory that the program can not map              |
//! | `close`, `dup`, `fcntl`, `close_range` | the life of a descriptor of ours                       |
//! | `sigaction`, `signal`                  | a handler waits until a call of ours has ended         |
//! | `pthread_cancel`                       | it is a signal, too                                    |
//! | `prctl`                                | filters of system calls that would end the engine      |
//! | `syscall`                              | all of these by number                                 |
//!
//! A vCPU's descriptor is a memfd that holds its `kvm_run`, so that a mapping of it is the kernel's
//! affair alone.
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

mod allocation;
mod bpf;
mod control;
mod descriptors;
mod ioctl;
mod mapping;
mod next;
mod open;
mod parameters;
mod paths;
mod process;
mod seccomp;
mod settings;
mod signals;
mod stats;
mod stream;
mod syscall;
mod trace;

use std::ffi::c_int;

/// Ends a C entry point with an errno: -1, and `errno` set.
fn fail(errno: c_int) -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}
