//! `ioctl`: the API itself.

use std::ffi::{c_int, c_ulong, c_void};
use std::time::Instant;

use kvm::Argument;
use kvm::fds::Inherited;
use kvm::table::number::KVMIO;

use kvm::signals::Call;

use crate::next::next;
use crate::settings::{Accel, Settings};
use crate::trace::exits;
use crate::{control, fail, process, stats, trace};

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// `_IO(KVMIO, 0x41)`.
const KVM_CREATE_VCPU: u32 = 0xae41;
/// `_IOWR(0xaa, 0, struct uffdio_register)`.
const UFFDIO_REGISTER: u32 = 0xc020_aa00;

/// The C library's `ioctl`; variadic there, the argument in the third place.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn ioctl(
    fd: c_int,
    request: c_ulong,
    argument: *mut c_void,
) -> c_int {
    // The C library's ioctl takes an unsigned long, the kernel the low 32 bits of it.
    let number = request as u32;
    if number == UFFDIO_REGISTER {
        // Whoever watches for faults wants to see those that happen, and no others.
        memory::ahead::forbid();
    }
    if number >> 8 & 0xff != KVMIO || Call::is_running() {
        return hand_on(fd, request, argument);
    }
    let settings = Settings::get();
    if !settings.watches() {
        return answer(fd, request, argument);
    }
    let began = Instant::now();
    let result = answer(fd, request, argument);
    let took = began.elapsed();
    let errno = last_errno();
    let _call = Call::enter();
    if settings.stats {
        stats::count(number, took);
        if number == KVM_RUN
            && result >= 0
            && let Some(reason) = exits::reason(fd)
        {
            stats::count_exit(reason);
        }
    }
    if settings.trace {
        trace::call(
            fd,
            number,
            Argument::new(argument as u64),
            (result, errno),
            took,
        );
    }
    if result < 0 {
        return fail(errno);
    }
    result
}

fn answer(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    let ours = {
        let _call = Call::enter();
        let answer = kvm::fds::ioctl(fd, request as u32, Argument::new(argument as u64));
        if request as u32 == KVM_CREATE_VCPU && matches!(answer, Some(Ok(_))) {
            control::start();
        }
        answer
    };
    let ours = ours.or_else(|| inherited(fd, request as u32, Argument::new(argument as u64)));
    match ours {
        Some(Ok(value)) => value as c_int,
        Some(Err(errno)) => fail(errno.0),
        None => hand_on(fd, request, argument),
    }
}

/// A descriptor of ours from another process: over `execve`, or sent here.
fn inherited(fd: c_int, number: u32, argument: Argument) -> Option<kvm::table::Answer> {
    let settings = Settings::get();
    if settings.accel == Accel::Kernel {
        return None;
    }
    let _call = Call::enter();
    match kvm::fds::inherited(fd)? {
        Inherited::Foreign => Some(Err(kvm::Errno::EIO)),
        Inherited::System => {
            process::note_owner();
            let adopted = kvm::fds::adopt_system(fd, &kvm::System::new(settings.of_vms()));
            Some(adopted.and_then(|()| kvm::fds::ioctl(fd, number, argument).unwrap_or(Ok(0))))
        }
    }
}

fn hand_on(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    next!(c"ioctl" as fn(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int)
}

fn last_errno() -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() }
}
