//! Filters of system calls (seccomp(2)) that would end the engine.
//!
//! A monitor that has locked itself in expects `/dev/kvm` to do its work in the kernel; ours is done
//! by the monitor's own threads, with system calls. So a filter is tried out before it is installed:
//! its program is run on each call that the engine makes.
//!
//! | the filter                   | by default                     | with `--ignore-seccomp`       |
//! |------------------------------|--------------------------------|-------------------------------|
//! | lets the engine work         | installed                      | installed                     |
//! | does not, `/dev/kvm` is open | refused (`EACCES`), and said   | left out, and said            |
//! | does not, it is not          | installed; the later open of `/dev/kvm` is refused, and said | left out, and said |

use std::ffi::{c_int, c_long, c_ulong};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm::signals::Call;

use crate::bpf::{self, Program, SeccompData};
use crate::next::next;
use crate::settings::{Accel, Settings};
use crate::{control, fail, process};

const PR_SET_SECCOMP: c_long = 22;
const MODE_STRICT: c_long = 1;
const MODE_FILTER: c_long = 2;
const SET_MODE_STRICT: c_long = 0;
const SET_MODE_FILTER: c_long = 1;
const RET_ACTION: u32 = 0xffff_0000;
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_LOG: u32 = 0x7ffc_0000;

const READ_WRITE: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const FRESH: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

/// What the engine calls while guests run, with arguments like those that it gives.
const NEEDED: &[(c_long, &str, [u64; 6])] = &[
    (libc::SYS_futex, "futex", [0, 128, 0, 0, 0, 0]),
    (
        libc::SYS_mmap,
        "mmap",
        [0, 0x20_0000, READ_WRITE, FRESH, u64::MAX, 0],
    ),
    (libc::SYS_munmap, "munmap", [0x1000, 0x1000, 0, 0, 0, 0]),
    (
        libc::SYS_mremap,
        "mremap",
        [0x1000, 0x1000, 0x2000, 1, 0, 0],
    ),
    (libc::SYS_brk, "brk", [0; 6]),
    (
        libc::SYS_madvise,
        "madvise",
        [0x1000, 0x1000, libc::MADV_DONTNEED as u64, 0, 0, 0],
    ),
    (libc::SYS_read, "read", [3, 0x1000, 8, 0, 0, 0]),
    (libc::SYS_write, "write", [3, 0x1000, 8, 0, 0, 0]),
    (
        libc::SYS_epoll_wait,
        "epoll_wait",
        [3, 0x1000, 16, u64::MAX, 0, 0],
    ),
    (
        libc::SYS_timerfd_settime,
        "timerfd_settime",
        [3, 1, 0x1000, 0, 0, 0],
    ),
    (
        libc::SYS_rt_sigprocmask,
        "rt_sigprocmask",
        [2, 0x1000, 0x1000, 8, 0, 0],
    ),
    (libc::SYS_rt_sigreturn, "rt_sigreturn", [0; 6]),
    (
        libc::SYS_rt_tgsigqueueinfo,
        "rt_tgsigqueueinfo",
        [1, 1, 10, 0x1000, 0, 0],
    ),
    (libc::SYS_getpid, "getpid", [0; 6]),
    (libc::SYS_gettid, "gettid", [0; 6]),
    (libc::SYS_sched_yield, "sched_yield", [0; 6]),
];

/// What a filter that is in force forbids.
static IN_FORCE: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

/// Why `/dev/kvm` can't be opened any more, if so.
pub(crate) fn forbidden() -> Option<String> {
    let calls = IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner);
    (!calls.is_empty()).then(|| calls.join(", "))
}

/// Says on standard error what stands in the way.
pub(crate) fn complain(calls: &str, what: &str) {
    eprintln!(
        "fourfold exec: this program's seccomp filter forbids {calls}, which our KVM needs; {what}. \
         Start the program with its own option against filters, or with `fourfold exec \
         --ignore-seccomp`, which leaves such filters out."
    );
}

/// The calls of the engine that this filter does not let through.
///
/// # Safety
/// `program` is the program's pointer to a filter, or null.
unsafe fn forbids(program: *const Program) -> Vec<&'static str> {
    let refused = |(number, _, args): &&(c_long, &str, [u64; 6])| {
        let data = SeccompData::new(*number as u32, *args);
        // SAFETY: as the caller says.
        let action = unsafe { bpf::run(program, &data) };
        // A program that can't be run is the kernel's to refuse.
        action.is_some_and(|a| !matches!(a & RET_ACTION, RET_ALLOW | RET_LOG))
    };
    let calls = NEEDED.iter().filter(refused);
    calls.map(|(_, name, _)| *name).collect()
}

/// What is answered in the kernel's place to a call that installs a filter; `None` where the kernel
/// is to answer.
///
/// # Safety
/// The arguments are those of `prctl` or `seccomp`, as the number says.
pub(crate) unsafe fn refuses(number: c_long, args: [c_long; 6]) -> Option<c_int> {
    let settings = Settings::get();
    if settings.accel == Accel::Kernel {
        return None;
    }
    let filter = match (number, args[0], args[1]) {
        (libc::SYS_prctl, PR_SET_SECCOMP, MODE_FILTER)
        | (libc::SYS_seccomp, SET_MODE_FILTER, _) => Some(args[2]),
        (libc::SYS_prctl, PR_SET_SECCOMP, MODE_STRICT)
        | (libc::SYS_seccomp, SET_MODE_STRICT, _) => None,
        _ => return None,
    };
    let _call = Call::enter();
    let forbidden = match filter {
        // SAFETY: as the caller says.
        Some(program) => unsafe { forbids(program as *const Program) },
        None => vec!["all but read, write and exit"],
    };
    // Fault-ahead, looks at the host's pages and the control socket make calls that are not on the
    // list.
    memory::ahead::forbid();
    memory::pagemap::forbid_scans();
    kvm::turns::forbid();
    control::give_up();
    if forbidden.is_empty() {
        return None;
    }
    let calls = forbidden.join(", ");
    if settings.ignore_seccomp {
        tell_once(&calls);
        return Some(0);
    }
    if process::is_owner() {
        complain(&calls, "it is not installed");
        return Some(fail(libc::EACCES));
    }
    *IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner) = forbidden;
    None
}

fn tell_once(calls: &str) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !TOLD.swap(true, Ordering::Relaxed) {
        eprintln!(
            "fourfold exec: left out a seccomp filter that forbids {calls} (--ignore-seccomp)"
        );
    }
}

/// The C library's `prctl`; variadic there.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn prctl(
    option: c_int,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
) -> c_int {
    let args = [
        c_long::from(option),
        a as c_long,
        b as c_long,
        c as c_long,
        d as c_long,
        0,
    ];
    if c_long::from(option) == PR_SET_SECCOMP && !Call::is_running() {
        // SAFETY: the program's own arguments.
        if let Some(answer) = unsafe { refuses(libc::SYS_prctl, args) } {
            return answer;
        }
    }
    next!(c"prctl" as fn(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int)
}
