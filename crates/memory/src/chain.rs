//! Signal handlers of ours in a program that has its own: which one stood there before, and how a
//! signal that is not ours gets to it.
//!
//! A program in which this code is a guest may set its handler at any time. Ours must stay in place,
//! so whoever sees the program's call (a preload library) makes it the one behind ours instead of
//! the one in front.

#![expect(
    unsafe_code,
    reason = "installs signal handlers and calls those that it found"
)]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t};

/// A signal handler with three arguments (`SA_SIGINFO`).
pub type Handler = unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// `N` signals and the actions that stood there before our handler.
pub struct Chain<const N: usize> {
    signals: [c_int; N],
    /// Leaked, also when replaced: a handler on another thread may be reading it. Programs set these
    /// handlers a handful of times.
    previous: [AtomicPtr<sigaction>; N],
}

impl<const N: usize> Chain<N> {
    /// None of ours stands at these signals yet.
    pub const fn new(signals: [c_int; N]) -> Self {
        Self {
            signals,
            previous: [const { AtomicPtr::new(ptr::null_mut()) }; N],
        }
    }

    /// Puts `handler` in front of what stands at each of the signals. To be called once.
    ///
    /// # Safety
    /// The handler is fit to run in signal context, and hands on what is not its own.
    pub unsafe fn install(&self, handler: Handler) {
        for signal in self.signals {
            let mut old = MaybeUninit::<sigaction>::zeroed();
            // SAFETY: an all-zero sigaction is valid; the handler has the signature that SA_SIGINFO
            // asks for; `sigaction` can't fail for such signals and fills `old`.
            unsafe {
                libc::sigaction(signal, ptr::null(), old.as_mut_ptr());
                let mut new = old.assume_init();
                // Before our handler can run and look for it.
                self.remember(signal, new);
                new.sa_sigaction = handler as *const () as usize;
                // On the alternate stack where there is one: Rust's own handler, which we chain to,
                // tells a stack overflow from other faults there.
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(signal, &raw const new, ptr::null_mut());
            }
        }
    }

    /// The action behind our handler for `signal`, or `None` where our handler does not stand there.
    pub fn previous(&self, signal: c_int) -> Option<sigaction> {
        let action = self.place(signal)?.load(Ordering::Acquire);
        // SAFETY: null, or what `remember` leaked: it lives for ever and is never written again.
        unsafe { action.as_ref() }.copied()
    }

    /// Makes `action` the one behind our handler and gives the one before, or `None` (and changes
    /// nothing) where our handler does not stand there.
    pub fn replace_previous(&self, signal: c_int, action: &sigaction) -> Option<sigaction> {
        let before = self.previous(signal)?;
        self.remember(signal, *action);
        Some(before)
    }

    /// Hands the signal to the handler that stood there before.
    ///
    /// # Safety
    /// The arguments are those that a handler of ours was called with.
    pub unsafe fn hand_on(&self, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        let Some(previous) = self.previous(signal) else {
            return;
        };
        match previous.sa_sigaction {
            // The instruction runs again, faults again, and the default action kills the process with
            // the core dump that it would have left without us. An ignored fault is a fatal one, too.
            libc::SIG_DFL | libc::SIG_IGN => {
                // SAFETY: `previous` is what the kernel gave us, with the default action; `info` is
                // the kernel's.
                unsafe {
                    let mut default = previous;
                    default.sa_sigaction = libc::SIG_DFL;
                    libc::sigaction(signal, &raw const default, ptr::null_mut());
                    // What a process sent comes once: it is sent again, and taken when we return.
                    if (*info).si_code <= 0 {
                        libc::raise(signal);
                    }
                }
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                // SAFETY: SA_SIGINFO says that the handler has three arguments; the address is that
                // of a handler that the kernel would have called.
                unsafe { std::mem::transmute::<usize, Handler>(handler)(signal, info, context) };
            }
            handler => {
                type Plain = unsafe extern "C" fn(c_int);
                // SAFETY: as above, with one argument.
                unsafe { std::mem::transmute::<usize, Plain>(handler)(signal) };
            }
        }
    }

    fn place(&self, signal: c_int) -> Option<&AtomicPtr<sigaction>> {
        let index = self.signals.iter().position(|s| *s == signal)?;
        Some(&self.previous[index])
    }

    fn remember(&self, signal: c_int, action: sigaction) {
        if let Some(place) = self.place(signal) {
            place.store(Box::leak(Box::new(action)), Ordering::Release);
        }
    }
}
