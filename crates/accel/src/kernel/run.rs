//! A vCPU's `kvm_run` page, and the way to make it leave `KVM_RUN`.
//!
//! A kick sets `immediate_exit`, which ends the next `KVM_RUN` at its beginning, and sends the
//! thread that may be inside one a signal. The signal's handler does nothing: being interrupted is
//! all that is wanted. The mapping is our own, beside that of kvm-ioctls, so that a kicker may
//! outlive its vCPU.

#![expect(
    unsafe_code,
    reason = "kvm_run is shared with the kernel, and signals are system calls"
)]

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
    sync::{
        Once,
        atomic::{AtomicI32, AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::{Errno, Exit, Kicker, Result, decode};

/// The mapping, and the thread that is in `KVM_RUN`.
pub(super) struct RunPage {
    at: NonNull<kvm_run>,
    size: usize,
    /// The thread, 0 outside `KVM_RUN`.
    thread: AtomicI32,
}

// SAFETY: the mapping is plain memory shared with the kernel. From other threads only
// `immediate_exit` is touched, atomically; all else is used by the vCPU's thread alone.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(super) fn map(vcpu: BorrowedFd<'_>, size: usize) -> Result<Self> {
        install_handler()?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self {
            at: NonNull::new(at.cast()).ok_or(Errno::new(libc::ENOMEM))?,
            size,
            thread: AtomicI32::new(0),
        })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field lies inside the mapping, which lives as long as `self`; nobody takes
        // a plain reference to it.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.at.as_ptr()).immediate_exit) }
    }

    /// Asks for [`Exit::InterruptWindow`], or no longer.
    pub(super) fn set_interrupt_window(&mut self, requested: u8) {
        // SAFETY: inside the mapping, and only the vCPU's thread writes it.
        unsafe { (&raw mut (*self.at.as_ptr()).request_interrupt_window).write(requested) };
    }

    pub(super) fn ready_for_interrupt(&self) -> bool {
        // SAFETY: inside the mapping, and the kernel only writes it during `KVM_RUN`.
        unsafe { (&raw const (*self.at.as_ptr()).ready_for_interrupt_injection).read() != 0 }
    }

    /// This thread enters `KVM_RUN`.
    pub(super) fn enter(&self) {
        // SAFETY: takes nothing and gives a number.
        let thread = unsafe { libc::gettid() };
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// It has left.
    pub(super) fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// A kick has had its effect.
    pub(super) fn forget_kick(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// What `KVM_RUN` left.
    pub(super) fn exit(&mut self) -> Exit<'_> {
        // SAFETY: the mapping is ours for as long as `self` is borrowed mutably; kickers touch
        // only `immediate_exit`, which no exit refers to.
        unsafe { decode(self.at, self.size) }
    }
}

impl Kicker for RunPage {
    fn kick(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a signal with a handler that does nothing, to a thread of this process (or
            // to nobody, should it have ended).
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN() + 2
}

fn install_handler() -> Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: Once = Once::new();
    let mut outcome = Ok(());
    INSTALLED.call_once(|| outcome = register_signal_handler(kick_signal(), nothing));
    outcome
}
