//! Signals of the calling program during `KVM_RUN`.
//!
//! In the kernel, a signal that arrives during `KVM_RUN` makes it return `EINTR`, and the program's
//! handler runs after guest code was left. In user space the handler would run in the middle of
//! guest code, on the vCPU's stack, and nobody would know of it afterwards. So:
//!
//! 1. The program's handlers are *adopted*: `trampoline` is installed in their place, with the same
//!    mask and flags. Outside `KVM_RUN` it calls the program's handler and that is all.
//! 2. During `KVM_RUN` it defers: it notes the signal with the vCPU (which leaves guest code at the
//!    next poll, or wakes from `HLT`), queues the same signal again with the same `siginfo`, and
//!    returns with all signals blocked.
//! 3. When guest code was left and the state is whole, [`Section::leave`] restores the mask. The
//!    kernel delivers the queued signal there, to the trampoline, which now calls the program's
//!    handler; it may `longjmp`, or call KVM. `KVM_RUN` returns `EINTR`.
//!
//! With `KVM_SET_SIGNAL_MASK`, the thread's mask is the given one during the section. A signal which
//! is blocked in the thread and not in the mask is then noted and stays pending: the program fetches
//! it with `sigwait`. It may well have no handler, so the trampoline is installed for those signals
//! whatever the program's disposition ([`unblocked_by`]), and stands for that disposition outside.
//!
//! Synchronous signals (`SIGSEGV`, `SIGBUS`, `SIGFPE`, `SIGILL`, `SIGTRAP`) are never deferred; they
//! belong to [`memory::access`] and to the CPU. Signals whose disposition is the default end or stop
//! the process as ever.
//!
//! Handlers that the program installs after its first `KVM_RUN` are adopted if it calls
//! [`sigaction`] here (the preload library's `sigaction` does), or at the next [`adopt`].
//!
//! | state of a thread    | `CURRENT` | mask                | a signal is            |
//! |----------------------|-----------|---------------------|------------------------|
//! | outside              | null      | the program's       | handled at once        |
//! | in a section         | set       | the program's or KVM's | deferred            |
//! | in a section, noted  | set       | all but synchronous | pending in the kernel  |
#![expect(
    unsafe_code,
    reason = "signal handlers, and the program's own function pointers called by them"
)]

use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void, siginfo_t, sigset_t, ucontext_t};

use crate::errno::Errno;

/// Highest signal number of Linux.
const LAST: usize = 64;
/// Signals of the C library itself, between 31 and `SIGRTMIN`.
const LIBRARY: std::ops::Range<c_int> = 32..34;
/// Never deferred.
const SYNCHRONOUS: [c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

/// What a signal handler may call.
pub trait Interrupt: Sync {
    /// Makes the vCPU leave guest code. Takes no lock and allocates nothing.
    fn interrupt(&self);
}

/// A set of signals in the kernel's form: bit 0 is signal 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalSet(pub u64);

impl SignalSet {
    fn has(self, signal: c_int) -> bool {
        self.0 >> (signal - 1) & 1 != 0
    }

    /// All signals that can be deferred.
    fn deferrable() -> Self {
        let synchronous = SYNCHRONOUS.iter().fold(0, |set, s| set | 1 << (s - 1));
        Self(!synchronous)
    }
}

/// The thread's section, for the trampoline.
struct Note {
    vcpu: &'static dyn Interrupt,
    noted: AtomicBool,
    /// The mask that the first deferred signal interrupted.
    interrupted: UnsafeCell<MaybeUninit<sigset_t>>,
}

thread_local! {
    static CURRENT: Cell<*const Note> = const { Cell::new(ptr::null()) };
}

/// The program's disposition of each signal for which the trampoline is installed; leaked, for a
/// handler may be looking at an old one.
static ADOPTED: [AtomicPtr<libc::sigaction>; LAST + 1] =
    [const { AtomicPtr::new(ptr::null_mut()) }; LAST + 1];
/// Orders those who change dispositions.
static CHANGE: Mutex<()> = Mutex::new(());

fn can_be_adopted(signal: c_int) -> bool {
    (1..=LAST as c_int).contains(&signal)
        && !SYNCHRONOUS.contains(&signal)
        && !LIBRARY.contains(&signal)
        && signal != libc::SIGKILL
        && signal != libc::SIGSTOP
}

fn trampoline_address() -> usize {
    trampoline as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize
}

fn current_action(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: only reads the disposition, into memory of the right size.
    unsafe {
        let answer = libc::sigaction(signal, ptr::null(), action.as_mut_ptr());
        (answer == 0).then(|| action.assume_init())
    }
}

/// Puts the trampoline in the place of `action`.
fn install(signal: c_int, action: libc::sigaction) {
    let mut ours = action;
    ours.sa_sigaction = trampoline_address();
    ours.sa_flags = ours.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    ADOPTED[signal as usize].store(Box::into_raw(Box::new(action)), Ordering::Release);
    // SAFETY: the trampoline is a handler of the SA_SIGINFO kind.
    unsafe { libc::sigaction(signal, &raw const ours, ptr::null_mut()) };
}

fn has_handler(action: &libc::sigaction) -> bool {
    action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN
}

/// Adopts one signal, where it has a handler that is not ours yet, or in any case.
fn adopt_one(signal: c_int, whatever_the_disposition: bool) {
    if !can_be_adopted(signal) {
        return;
    }
    let Some(action) = current_action(signal) else {
        return;
    };
    let ours = action.sa_sigaction == trampoline_address();
    if !ours && (whatever_the_disposition || has_handler(&action)) {
        install(signal, action);
    }
}

/// Adopts every handler that the program has now.
pub fn adopt() {
    let _order = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    for signal in 1..=LAST as c_int {
        adopt_one(signal, false);
    }
}

/// Adopts the signals that `mask` lets through: the program waits for those, with or without a
/// handler.
pub fn unblocked_by(mask: SignalSet) {
    let blocked = thread_mask();
    let _order = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    for signal in 1..=LAST as c_int {
        if blocked.has(signal) && !mask.has(signal) {
            adopt_one(signal, true);
        }
    }
}

/// `sigaction(2)` as the program sees it: its own handlers, never the trampoline.
///
/// # Safety
/// As for `sigaction(2)`: `new` and `old` are null or valid, and a handler in `new` is one.
pub unsafe fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    if !can_be_adopted(signal) {
        // SAFETY: as the caller says.
        return unsafe { libc::sigaction(signal, new, old) };
    }
    let _order = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let adopted = ADOPTED[signal as usize].load(Ordering::Acquire);
    // SAFETY: the pointers are the caller's to vouch for; an adopted action is never freed.
    unsafe {
        let ours = current_action(signal).is_some_and(|a| a.sa_sigaction == trampoline_address());
        let seen = (ours && !adopted.is_null()).then(|| *adopted);
        if !new.is_null() {
            if has_handler(&*new) {
                install(signal, *new);
            } else {
                let answer = libc::sigaction(signal, new, ptr::null_mut());
                if answer != 0 {
                    return answer;
                }
            }
        }
        if !old.is_null() {
            match seen {
                Some(action) => *old = action,
                None if new.is_null() => return libc::sigaction(signal, ptr::null(), old),
                None => *old = std::mem::zeroed(),
            }
        }
        0
    }
}

/// The calling thread's mask.
fn thread_mask() -> SignalSet {
    let mut set = MaybeUninit::<sigset_t>::uninit();
    // SAFETY: only reads the mask; the kernel's part of the set is its first 64 bits.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), set.as_mut_ptr());
        SignalSet(set.as_ptr().cast::<u64>().read())
    }
}

fn to_libc(set: SignalSet) -> sigset_t {
    let mut libc_set = MaybeUninit::<sigset_t>::zeroed();
    // SAFETY: an all-zero set is empty; the kernel's part is its first 64 bits.
    unsafe {
        libc_set.as_mut_ptr().cast::<u64>().write(set.0);
        libc_set.assume_init()
    }
}

/// Stands in the place of the program's handlers.
extern "C" fn trampoline(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let note = CURRENT.get();
    if note.is_null() {
        stand_in(signal, info, context);
    } else {
        // SAFETY: `CURRENT` points to this thread's section while it lasts; the kernel gave us
        // `info` and `context`.
        unsafe { defer(&*note, signal, info, context.cast()) };
    }
}

/// Notes the signal, queues it again, and blocks everything until the section ends.
///
/// # Safety
/// Called by a signal handler with what the kernel gave it.
unsafe fn defer(note: &Note, signal: c_int, info: *mut siginfo_t, context: *mut ucontext_t) {
    // SAFETY: our own frame; `note` is this thread's. Only system calls and atomics.
    unsafe {
        let all = to_libc(SignalSet::deferrable());
        // First, lest SA_NODEFER hand us the queued signal at once.
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, ptr::null_mut());
        if !note.noted.load(Ordering::Relaxed) {
            (*note.interrupted.get()).write((*context).uc_sigmask);
        }
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            signal,
            info,
        );
        (&raw mut (*context).uc_sigmask)
            .cast::<u64>()
            .write(SignalSet::deferrable().0);
        note.noted.store(true, Ordering::Relaxed);
        note.vcpu.interrupt();
    }
}

/// Does what the program's disposition says.
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
                    let call: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                        std::mem::transmute(handler);
                    call(signal, info, context);
                } else {
                    let call: extern "C" fn(c_int) = std::mem::transmute(handler);
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

/// `KVM_RUN`, as far as signals are concerned.
pub struct Section {
    note: Box<Note>,
    /// The thread's own mask, where `KVM_SET_SIGNAL_MASK` replaced it.
    own: Option<sigset_t>,
}

/// Whether a signal ended a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// None came.
    Undisturbed,
    /// At least one did; its handler has run by now, unless the thread blocks it.
    BySignal,
}

impl Section {
    /// Begins a section in this thread: from now on signals are noted with `vcpu`, which must
    /// outlive the section.
    pub fn enter<'a>(vcpu: &'a (dyn Interrupt + 'a), mask: Option<SignalSet>) -> Self {
        // SAFETY: only the lifetime is erased; `drop` ends the use.
        let vcpu = unsafe {
            std::mem::transmute::<&'a (dyn Interrupt + 'a), &'static (dyn Interrupt + 'static)>(
                vcpu,
            )
        };
        let note = Box::new(Note {
            vcpu,
            noted: AtomicBool::new(false),
            interrupted: UnsafeCell::new(MaybeUninit::uninit()),
        });
        CURRENT.set(&raw const *note);
        let own = mask.map(|mask| set_mask(&to_libc(mask)));
        Self { note, own }
    }

    /// Whether a signal was noted.
    pub fn noted(&self) -> bool {
        self.note.noted.load(Ordering::Relaxed)
    }

    /// Ends the section: deferred signals are delivered here.
    pub fn leave(self) -> Ended {
        if self.noted() {
            Ended::BySignal
        } else {
            Ended::Undisturbed
        }
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        CURRENT.set(ptr::null());
        // A signal noted until here is pending, and blocked.
        let noted = self.noted();
        // SAFETY: written before `noted` was set, by this thread.
        let interrupted =
            noted.then(|| unsafe { (*self.note.interrupted.get()).assume_init_read() });
        if let Some(mask) = self.own.take().or(interrupted) {
            set_mask(&mask);
        }
    }
}

/// Replaces this thread's mask; gives the old one.
fn set_mask(mask: &sigset_t) -> sigset_t {
    let mut old = MaybeUninit::<sigset_t>::zeroed();
    // SAFETY: both sets are ours.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, mask, old.as_mut_ptr());
        old.assume_init()
    }
}

/// The mask of `KVM_SET_SIGNAL_MASK`: 8 bytes.
pub fn mask_from(len: u32, bits: u64) -> Result<SignalSet, Errno> {
    if len as usize != size_of::<u64>() {
        return Err(Errno::EINVAL);
    }
    // SIGKILL and SIGSTOP can't be blocked.
    Ok(SignalSet(
        bits & !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1)),
    ))
}
