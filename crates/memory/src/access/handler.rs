//! The handler of `SIGSEGV` and `SIGBUS`.
//!
//! It serves, in this order: the fix-up table of this module; hooks that other crates registered
//! (translated code reaches guest memory by instructions of its own); whatever handler stood there
//! before it. A fault that nobody takes kills the process as it would have without us.
//!
//! Everything here is async-signal-safe: it takes no lock and allocates nothing.

use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use addr::Hva;

use super::instruction::table;
use crate::chain::Chain;

/// The state of the thread that faulted, as the kernel saved it; changes take effect when the
/// handler returns.
pub struct Context<'a> {
    /// `SIGSEGV` or `SIGBUS`.
    pub signal: i32,
    /// The address that the access named (zero where it was not canonical).
    pub address: Hva,
    /// The general registers, indexed by `libc::REG_RIP` and its family.
    pub registers: &'a mut [libc::greg_t; 23],
}

/// Whether a hook took a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Resume with the registers as they are now.
    Resume,
    /// Not ours.
    Pass,
}

/// A hook into the handler. It runs in signal context: no locks, no allocation.
pub type Hook = fn(&mut Context<'_>) -> Verdict;

const MAX_HOOKS: usize = 8;

static HOOKS: [AtomicPtr<()>; MAX_HOOKS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_HOOKS];
static INSTALLED: Once = Once::new();
static CHAIN: Chain<2> = Chain::new([libc::SIGSEGV, libc::SIGBUS]);

/// The action behind our handler for `signal`, or `None` where our handler does not stand there.
pub fn previous(signal: libc::c_int) -> Option<libc::sigaction> {
    CHAIN.previous(signal)
}

/// Makes `action` the one behind our handler and gives the one before, or `None` (and changes
/// nothing) where our handler does not stand there.
pub fn replace_previous(signal: libc::c_int, action: &libc::sigaction) -> Option<libc::sigaction> {
    CHAIN.replace_previous(signal, action)
}

/// Installs the handler, once for the process; calls after the first do nothing.
///
/// [`crate::ram::GuestRam`] and [`crate::slot::Slots`] call it: nobody can have guest memory before.
pub fn install() {
    // SAFETY: the handler takes no lock and allocates nothing, and hands on what it does not know.
    INSTALLED.call_once(|| unsafe { CHAIN.install(handle) });
}

/// Adds a hook. Returns whether there was room for it (there are eight places).
///
/// A hook that is already there is not added twice.
#[must_use]
pub fn register_hook(hook: Hook) -> bool {
    install();
    HOOKS.iter().any(|place| {
        let hook = hook as *mut ();
        match place.compare_exchange(ptr::null_mut(), hook, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(taken) => taken == hook,
        }
    })
}

unsafe extern "C" fn handle(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes valid pointers, and nobody else refers to them while we run.
    let (info_ref, ucontext) = unsafe { (&*info, &mut *context.cast::<libc::ucontext_t>()) };
    let mut state = Context {
        signal,
        // SAFETY: both signals carry an address where the kernel raised them (`si_code` > 0).
        address: Hva::new(unsafe { info_ref.si_addr() } as u64),
        registers: &mut ucontext.uc_mcontext.gregs,
    };
    // A signal that a process sent (`si_code` <= 0) is no fault of the instruction it interrupts.
    let raised_by_fault = info_ref.si_code > 0;
    if raised_by_fault && (fix_up(&mut state) || ask_hooks(&mut state)) {
        return;
    }
    // SAFETY: the arguments are those that we were called with.
    unsafe { CHAIN.hand_on(signal, info, context) };
}

fn fix_up(state: &mut Context<'_>) -> bool {
    let rip = state.registers[libc::REG_RIP as usize] as usize;
    let Some(entry) = table().iter().find(|e| e.fault() == rip) else {
        return false;
    };
    state.registers[libc::REG_RIP as usize] = entry.landing() as libc::greg_t;
    state.registers[libc::REG_RDX as usize] = libc::greg_t::from(state.signal);
    true
}

fn ask_hooks(state: &mut Context<'_>) -> bool {
    HOOKS.iter().any(|place| {
        let hook = place.load(Ordering::Acquire);
        if hook.is_null() {
            return false;
        }
        // SAFETY: only `register_hook` stores there, and it stores `Hook`s.
        let hook = unsafe { std::mem::transmute::<*mut (), Hook>(hook) };
        hook(state) == Verdict::Resume
    })
}
