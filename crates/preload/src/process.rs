//! Which process the objects belong to.
//!
//! As in the kernel, a VM belongs to the process that made it: a child of `fork` gets `EIO` from its
//! calls ([`kvm::fds::follow_forks`]). A child of `vfork` even shares our memory, so it must change
//! nothing in it.

use std::sync::atomic::{AtomicI32, Ordering};

/// The process that opened `/dev/kvm`; 0 before.
static OWNER: AtomicI32 = AtomicI32::new(0);

/// This process opens `/dev/kvm`.
pub(crate) fn note_owner() {
    kvm::fds::follow_forks();
    if OWNER.swap(id(), Ordering::Relaxed) == 0 {
        kvm::signals::adopt();
    }
}

/// Whether this process made the objects.
pub(crate) fn is_owner() -> bool {
    let owner = OWNER.load(Ordering::Relaxed);
    owner != 0 && owner == id()
}

fn id() -> i32 {
    // SAFETY: no arguments, no failure.
    unsafe { libc::getpid() }
}
