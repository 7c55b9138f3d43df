//! Traps of the host in translated code: a division by zero, a misaligned vector access, an unmasked
//! floating-point exception, memory that isn't there.
//!
//! The handlers run on the stack below the frame or on the program's alternate one. Where the
//! interrupted address lies in the code cache of the vCPU that this thread runs, they note what
//! happened in the frame and let the thread go on at the cache's stub for traps, with every register
//! as it was. Everything else goes to the handler that stood there before, or that was put there
//! since ([`replace_previous`]).

#![expect(
    unsafe_code,
    reason = "installs signal handlers, which read and change a thread's saved registers"
)]

use std::cell::Cell;
use std::sync::Once;

use memory::access::{self, Verdict};
use memory::chain::Chain;

use super::frame::{Frame, HostTrap};

/// What the handlers know of the vCPU that a thread runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) frame: *mut Frame,
    /// Addresses of translated code.
    pub(crate) code: (u64, u64),
    /// Where to go on.
    pub(crate) stub: u64,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

/// Marks the vCPU that this thread runs; the one before is returned, to be put back.
pub(crate) fn set_running(running: Option<Running>) -> Option<Running> {
    install();
    RUNNING.with(|r| r.replace(running))
}

static CHAIN: Chain<2> = Chain::new([libc::SIGFPE, libc::SIGILL]);

/// The action behind our handler for `signal`, or `None` where our handler does not stand there.
pub fn previous(signal: libc::c_int) -> Option<libc::sigaction> {
    CHAIN.previous(signal)
}

/// Makes `action` the one behind our handler and gives the one before, or `None` (and changes
/// nothing) where our handler does not stand there.
pub fn replace_previous(signal: libc::c_int, action: &libc::sigaction) -> Option<libc::sigaction> {
    CHAIN.replace_previous(signal, action)
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let registered = access::register_hook(memory_hook);
        debug_assert!(registered, "no room for another hook");
        // SAFETY: the handler takes no lock and allocates nothing, and hands on what is not of
        // translated code.
        unsafe { CHAIN.install(handle) };
    });
}

fn memory_hook(context: &mut access::Context<'_>) -> Verdict {
    if divert(context.registers, context.address.raw()) {
        Verdict::Resume
    } else {
        Verdict::Pass
    }
}

/// Lets the thread go on at the stub for traps, if it was in translated code.
fn divert(registers: &mut [libc::greg_t; 23], address: u64) -> bool {
    let Some(running) = RUNNING.with(Cell::get) else {
        return false;
    };
    let pc = registers[libc::REG_RIP as usize] as u64;
    if pc < running.code.0 || pc >= running.code.1 {
        return false;
    }
    let trap = HostTrap {
        pc,
        vector: registers[libc::REG_TRAPNO as usize] as u64,
        address,
        rcx: registers[libc::REG_RCX as usize] as u64,
    };
    // SAFETY: the frame belongs to the vCPU that this thread runs, and translated code, which was
    // interrupted, holds no reference to it.
    unsafe { (*running.frame).fault = trap };
    registers[libc::REG_RIP as usize] = running.stub as libc::greg_t;
    true
}

unsafe extern "C" fn handle(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes valid pointers.
    let diverted = unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        (*info).si_code > 0 && divert(registers, (*info).si_addr() as u64)
    };
    if diverted {
        return;
    }
    // SAFETY: the arguments are those that we were called with.
    unsafe { CHAIN.hand_on(signal, info, context) };
}
