//! `syscall`: the calls of the other modules, made by number.
//!
//! Programs make some calls so that the C library has no function for (`openat2`, `seccomp`), and
//! some that it has. Those that concern us take the way of the function of their name; all others
//! go to the kernel as they came.

#![expect(
    clippy::many_single_char_names,
    reason = "the six arguments of a system call have no better names"
)]

use std::arch::asm;
use std::ffi::{c_int, c_long, c_uint, c_ulong, c_void};

use kvm::signals::Call;

use crate::{allocation, descriptors, fail, ioctl, mapping, open, seccomp};

/// The C library's `syscall`; variadic there.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if !Call::is_running() {
        // SAFETY: the program's own arguments, of the kinds that the number says.
        if let Some(answer) = unsafe { ours(number, [a, b, c, d, e, f]) } {
            return answer;
        }
    }
    // SAFETY: the program asks for it.
    let answer = unsafe { raw(number, [a, b, c, d, e, f]) };
    if (-4095..0).contains(&answer) {
        return c_long::from(fail(-answer as c_int));
    }
    answer
}

/// # Safety
/// The arguments are those of the system call.
unsafe fn ours(number: c_long, args: [c_long; 6]) -> Option<c_long> {
    let [a, b, c, d, e, f] = args;
    let int = |value: c_long| value as c_int;
    // SAFETY: as the caller says; each function has the C library's contract.
    let answer = unsafe {
        match number {
            libc::SYS_open => open::ours(a as *const _, int(b))?,
            libc::SYS_openat => open::ours(b as *const _, int(c))?,
            libc::SYS_openat2 => {
                let how = (c as *const libc::open_how).as_ref()?;
                open::ours(b as *const _, how.flags as c_int)?
            }
            libc::SYS_ioctl => ioctl::ioctl(int(a), b as c_ulong, c as *mut c_void),
            libc::SYS_close => {
                descriptors::forget(int(a));
                return None;
            }
            libc::SYS_close_range => descriptors::close_range(a as c_uint, b as c_uint, int(c)),
            libc::SYS_dup => descriptors::dup(int(a)),
            libc::SYS_dup2 => descriptors::dup2(int(a), int(b)),
            libc::SYS_dup3 => descriptors::dup3(int(a), int(b), int(c)),
            libc::SYS_fcntl => descriptors::fcntl(int(a), int(b), c as *mut c_void),
            libc::SYS_mmap => {
                let at = mapping::mmap(a as *mut _, b as usize, int(c), int(d), int(e), f);
                return Some(at as c_long);
            }
            libc::SYS_fallocate => allocation::ours(int(a), int(b), c, d)?,
            libc::SYS_prctl | libc::SYS_seccomp => seccomp::refuses(number, args)?,
            _ => return None,
        }
    };
    Some(c_long::from(answer))
}

/// The system call itself; -4095 to -1 are errnos.
///
/// # Safety
/// As the system call's.
unsafe fn raw(number: c_long, [a, b, c, d, e, f]: [c_long; 6]) -> c_long {
    let answer;
    // SAFETY: the kernel's calling convention on x86-64; what the call does is the caller's affair.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => answer,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer
}
