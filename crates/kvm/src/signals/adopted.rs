//! The program's handlers, and the trampoline that stands in their place.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_void, siginfo_t};

use super::mask::{CANCEL, LAST, SETXID, SYNCHRONOUS, SignalSet, thread_mask};
use super::thread;

/// The program's disposition of each signal for which the trampoline is installed; leaked, for a
/// handler may be looking at an old one.
static ADOPTED: [AtomicPtr<libc::sigaction>; LAST + 1] =
    [const { AtomicPtr::new(ptr::null_mut()) }; LAST + 1];
/// Orders those who change dispositions.
static CHANGE: Mutex<()> = Mutex::new(());

/// Keeps others from changing dispositions; for the time of a `fork`, too.
pub(crate) fn order() -> MutexGuard<'static, ()> {
    CHANGE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn can_be_adopted(signal: c_int) -> bool {
    (1..=LAST as c_int).contains(&signal)
        && !SYNCHRONOUS.contains(&signal)
        && signal != CANCEL
        && signal != SETXID
        && signal != libc::SIGKILL
        && signal != libc::SIGSTOP
}

fn trampoline_address() -> usize {
    trampoline as extern "C-unwind" fn(c_int, *mut siginfo_t, *mut c_void) as usize
}

fn current_action(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only reads the disposition, into memory of the right size.
    unsafe {
        let answer = libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        (answer == 0).then(|| action.assume_init())
    }
}

/// `action` with the trampoline in its place.
fn with_trampoline(action: &libc::sigaction) -> libc::sigaction {
    let mut ours = *action;
    ours.sa_sigaction = trampoline_address();
    ours.sa_flags = ours.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    ours
}

fn remember(signal: c_int, action: libc::sigaction) {
    ADOPTED[signal as usize].store(Box::into_raw(Box::new(action)), Ordering::Release);
}

fn install(signal: c_int, action: libc::sigaction) {
    remember(signal, action);
    let ours = with_trampoline(&action);
    // SAFETY: the trampoline is a handler of the SA_SIGINFO kind.
    unsafe { libc::sigaction(signal, &raw const ours, ptr::null_mut()) };
}

fn has_handler(action: &libc::sigaction) -> bool {
    action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN
}

/// Which dispositions are adopted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dispositions {
    Handlers,
    All,
}

/// Adopts one signal, where it has such a disposition, and not ours yet.
fn adopt_one(signal: c_int, which: Dispositions) {
    if !can_be_adopted(signal) {
        return;
    }
    let Some(action) = current_action(signal) else {
        return;
    };
    let ours = action.sa_sigaction == trampoline_address();
    if !ours && (which == Dispositions::All || has_handler(&action)) {
        install(signal, action);
    }
}

/// Adopts every handler that the program has now.
pub fn adopt() {
    let _order = order();
    for signal in 1..=LAST as c_int {
        adopt_one(signal, Dispositions::Handlers);
    }
}

/// Adopts the signals that `mask` lets through: the program waits for those, with or without a
/// handler.
pub fn unblocked_by(mask: SignalSet) {
    let blocked = thread_mask();
    let _order = order();
    for signal in 1..=LAST as c_int {
        if blocked.has(signal) && !mask.has(signal) {
            adopt_one(signal, Dispositions::All);
        }
    }
}

/// `struct sigaction` of the system call; the C library's refuses to touch its own signals.
#[repr(C)]
#[derive(Default)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

fn kernel_action(signal: c_int, new: Option<&KernelAction>, old: Option<&mut KernelAction>) {
    // SAFETY: null or structures of ours; a handler is the kernel's answer or the trampoline.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            new.map_or(ptr::null(), ptr::from_ref),
            old.map_or(ptr::null_mut(), ptr::from_mut),
            size_of::<u64>(),
        );
    }
}

/// Adopts the C library's handler for `pthread_cancel`, which it installs at the first use: a thread
/// that is cancelled asynchronously unwinds its stack from that handler, and there is nothing to
/// unwind in guest code.
pub fn adopt_cancellation() {
    let _order = order();
    let mut action = KernelAction::default();
    kernel_action(CANCEL, None, Some(&mut action));
    let theirs = action.handler;
    if theirs == libc::SIG_DFL || theirs == libc::SIG_IGN || theirs == trampoline_address() {
        return;
    }
    // SAFETY: a C structure of integers and pointers, of which zero is a value.
    let mut known: libc::sigaction = unsafe { std::mem::zeroed() };
    known.sa_sigaction = theirs;
    known.sa_flags = action.flags as c_int;
    remember(CANCEL, known);
    action.handler = trampoline_address();
    action.flags |= libc::SA_SIGINFO as u64;
    kernel_action(CANCEL, Some(&action), None);
}

/// `sigaction(2)` as the program sees it: its own handlers, never the engine's.
///
/// # Safety
/// As for `sigaction(2)`: `new` and `old` are null or valid, and a handler in `new` is one.
pub unsafe fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe {
        if let Some(behind) = behind_engine(signal, new.as_ref()) {
            if let Some(old) = old.as_mut() {
                *old = behind;
            }
            return 0;
        }
        if can_be_adopted(signal) {
            adopted_sigaction(signal, new, old)
        } else {
            libc::sigaction(signal, new, old)
        }
    }
}

/// The signals of a fault belong to the engine: its handlers stay, and the program's become those
/// that a fault is handed on to which is not the engine's.
fn behind_engine(signal: c_int, new: Option<&libc::sigaction>) -> Option<libc::sigaction> {
    let of_memory = match new {
        Some(new) => memory::access::replace_previous(signal, new),
        None => memory::access::previous(signal),
    };
    of_memory.or_else(|| match new {
        Some(new) => cpu::traps::replace_previous(signal, new),
        None => cpu::traps::previous(signal),
    })
}

/// # Safety
/// As for [`sigaction`].
unsafe fn adopted_sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let _order = order();
    let adopted = ADOPTED[signal as usize].load(Ordering::Acquire);
    // SAFETY: the pointers are the caller's to vouch for; an adopted action is never freed.
    unsafe {
        let Some(present) = current_action(signal) else {
            return libc::sigaction(signal, new, old);
        };
        let ours = present.sa_sigaction == trampoline_address() && !adopted.is_null();
        let seen = if ours { *adopted } else { present };
        if let Some(new) = new.as_ref() {
            if has_handler(new) {
                install(signal, *new);
            } else {
                libc::sigaction(signal, new, ptr::null_mut());
            }
        }
        if let Some(old) = old.as_mut() {
            *old = seen;
        }
        0
    }
}

/// Stands in the place of the program's handlers.
extern "C-unwind" fn trampoline(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gave us `info` and `context`.
    if unsafe { thread::defer(signal, info, context.cast()) } == thread::Deferred::No {
        stand_in(signal, info, context);
    }
}

/// Does what the program's disposition says. The handler may unwind (it is how a thread is
/// cancelled), or jump away.
fn stand_in(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let adopted = ADOPTED[signal as usize].load(Ordering::Acquire);
    // SAFETY: adopted actions are never freed; the program says what kind of function its handler
    // is.
    unsafe {
        let Some(action) = adopted.as_ref() else {
            return;
        };
        match action.sa_sigaction {
            libc::SIG_IGN => {}
            libc::SIG_DFL => default_action(signal),
            handler => {
                if action.sa_flags & libc::SA_RESETHAND != 0 {
                    restore_default(signal);
                }
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    let call: extern "C-unwind" fn(c_int, *mut siginfo_t, *mut c_void) =
                        std::mem::transmute(handler);
                    call(signal, info, context);
                } else {
                    let call: extern "C-unwind" fn(c_int) = std::mem::transmute(handler);
                    call(signal);
                }
            }
        }
    }
}

fn restore_default(signal: c_int) {
    // SAFETY: the default disposition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Lets the kernel do the default: it comes back with the disposition restored and the signal
/// pending, to be taken when this handler returns.
fn default_action(signal: c_int) {
    restore_default(signal);
    // SAFETY: sends a signal to this thread.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
}
