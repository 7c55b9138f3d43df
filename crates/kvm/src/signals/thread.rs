//! What a thread is doing, as far as its signals are concerned.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, compiler_fence};

use libc::{c_int, siginfo_t, ucontext_t};

use super::mask::{SignalSet, set_mask};

/// What a signal handler may call.
pub trait Interrupt: Sync {
    /// Makes the vCPU leave guest code. Takes no lock and allocates nothing.
    fn interrupt(&self);
}

/// Written by the thread, read and written by its signal handlers.
struct Thread {
    /// How many calls of ours this thread is in.
    depth: AtomicU32,
    /// Whose guest code it runs.
    vcpu: Cell<Option<&'static dyn Interrupt>>,
    /// A signal was deferred.
    noted: AtomicBool,
    /// The mask that the first deferred signal interrupted.
    interrupted: UnsafeCell<MaybeUninit<SignalSet>>,
}

thread_local! {
    // `const` and without a destructor: there from a thread's first to its last instruction.
    static THREAD: Thread = const {
        Thread {
            depth: AtomicU32::new(0),
            vcpu: Cell::new(None),
            noted: AtomicBool::new(false),
            interrupted: UnsafeCell::new(MaybeUninit::uninit()),
        }
    };
}

/// This thread is in a call of KVM's, as it would be in the kernel: the program's handlers wait
/// until it is dropped.
pub struct Call(PhantomData<*const ()>);

impl Call {
    /// Enters.
    pub fn enter() -> Self {
        THREAD.with(|t| {
            let depth = t.depth.load(Ordering::Relaxed);
            t.depth.store(depth + 1, Ordering::Relaxed);
        });
        compiler_fence(Ordering::SeqCst);
        Self(PhantomData)
    }

    /// Whether this thread is in one.
    pub fn is_running() -> bool {
        THREAD.with(|t| t.depth.load(Ordering::Relaxed)) > 0
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        THREAD.with(|t| {
            let depth = t.depth.load(Ordering::Relaxed) - 1;
            t.depth.store(depth, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            if depth == 0 && t.noted.load(Ordering::Relaxed) {
                deliver(t);
            }
        });
    }
}

/// Lets the kernel deliver what was deferred. A handler may never return from here, so all is
/// settled before.
#[cold]
fn deliver(thread: &Thread) {
    thread.noted.store(false, Ordering::Relaxed);
    // SAFETY: written before `noted` was set, by this thread.
    let interrupted = unsafe { (*thread.interrupted.get()).assume_init_read() };
    set_mask(interrupted);
}

/// What a handler is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Deferred {
    /// The signal comes again.
    Yes,
    /// The thread is in the program's own code.
    No,
}

/// In a call of ours: notes the signal, queues it again, and blocks everything until the call ends.
///
/// # Safety
/// Called by a signal handler with what the kernel gave it.
pub(super) unsafe fn defer(
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut ucontext_t,
) -> Deferred {
    THREAD.with(|thread| {
        if thread.depth.load(Ordering::Relaxed) == 0 {
            return Deferred::No;
        }
        // SAFETY: our own frame and this thread's state. Only system calls and atomics.
        unsafe {
            let mask = (&raw mut (*context).uc_sigmask).cast::<SignalSet>();
            // First, lest SA_NODEFER hand us the queued signal at once.
            set_mask(SignalSet::deferrable());
            if !thread.noted.load(Ordering::Relaxed) {
                (*thread.interrupted.get()).write(mask.read());
            }
            libc::syscall(
                libc::SYS_rt_tgsigqueueinfo,
                libc::getpid(),
                libc::gettid(),
                signal,
                info,
            );
            mask.write(SignalSet::deferrable());
        }
        thread.noted.store(true, Ordering::Relaxed);
        if let Some(vcpu) = thread.vcpu.get() {
            vcpu.interrupt();
        }
        Deferred::Yes
    })
}

/// `KVM_RUN`, as far as signals are concerned.
pub struct Section {
    /// The thread's own mask, where `KVM_SET_SIGNAL_MASK` replaced it.
    own: Option<SignalSet>,
    /// Dropped last.
    _call: Call,
}

/// Whether a signal ended a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// None came.
    Undisturbed,
    /// At least one did; its handler has run by now, unless the thread blocks it or is in a call
    /// around this one.
    BySignal,
}

impl Section {
    /// Begins a section in this thread: from now on signals are noted with `vcpu`, which must
    /// outlive the section.
    pub fn enter<'a>(vcpu: &'a (dyn Interrupt + 'a), mask: Option<SignalSet>) -> Self {
        let call = Call::enter();
        // SAFETY: only the lifetime is erased; `drop` ends the use.
        let vcpu = unsafe {
            std::mem::transmute::<&'a (dyn Interrupt + 'a), &'static (dyn Interrupt + 'static)>(
                vcpu,
            )
        };
        THREAD.with(|t| t.vcpu.set(Some(vcpu)));
        compiler_fence(Ordering::SeqCst);
        let mut section = Self {
            own: None,
            _call: call,
        };
        // With a signal noted, `KVM_RUN` ends at once, and the mask to return to is kept already.
        if !section.noted() {
            section.own = mask.map(|mask| set_mask(mask.without_synchronous()));
        }
        section
    }

    /// Whether a signal was noted.
    pub fn noted(&self) -> bool {
        THREAD.with(|t| t.noted.load(Ordering::Relaxed))
    }

    /// Ends the section: deferred signals are delivered here, or where the call around it ends.
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
        compiler_fence(Ordering::SeqCst);
        THREAD.with(|t| t.vcpu.set(None));
        if let Some(own) = self.own.take() {
            // What the thread's own mask lets through is noted anew, with that mask.
            THREAD.with(|t| t.noted.store(false, Ordering::Relaxed));
            set_mask(own);
        }
    }
}
