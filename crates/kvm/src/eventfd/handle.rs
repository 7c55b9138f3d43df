//! An eventfd that belongs to somebody else: checked, duplicated, and compared by identity.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::errno::Errno;

/// A reference of ours to a caller's eventfd.
///
/// Two descriptors of one eventfd are equal, as in kvm.ko, which compares the kernel's objects.
#[derive(Debug)]
pub struct EventHandle {
    fd: OwnedFd,
    identity: Identity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    /// The kernel's number for the eventfd (`/proc/self/fdinfo`).
    Kernel(u64),
    /// Without /proc: the caller's descriptor.
    Descriptor(RawFd),
}

impl EventHandle {
    /// Takes a reference. `EBADF` where nothing is open there, `EINVAL` where it is no eventfd.
    pub fn new(fd: RawFd) -> Result<EventHandle, Errno> {
        let copy = duplicate(fd)?;
        let identity = identify(copy.as_raw_fd(), fd)?;
        Ok(EventHandle { fd: copy, identity })
    }

    /// Whether both are the same eventfd.
    pub fn is_same(&self, other: &EventHandle) -> bool {
        self.identity == other.identity
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Adds 1.
    #[expect(
        unsafe_code,
        reason = "the descriptor may be of a kind that blocks, so plain write(2)"
    )]
    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: eight live bytes. A full counter means that the event is known already.
        unsafe { libc::write(self.fd(), (&raw const one).cast(), 8) };
    }

    /// Takes the count, without blocking whatever the owner has set. `None` where it is 0.
    #[expect(unsafe_code, reason = "preadv2(2) has no safe wrapper")]
    pub fn take(&self) -> Option<u64> {
        let mut count = 0u64;
        let vector = libc::iovec {
            iov_base: (&raw mut count).cast(),
            iov_len: 8,
        };
        // SAFETY: one vector of eight live bytes.
        let read = unsafe { libc::preadv2(self.fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
        (read == 8).then_some(count)
    }
}

#[expect(unsafe_code, reason = "fcntl(2)")]
fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers; a descriptor that is not negative is ours alone.
    unsafe {
        let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 {
            Err(Errno::EBADF)
        } else {
            Ok(OwnedFd::from_raw_fd(copy))
        }
    }
}

fn identify(fd: RawFd, original: RawFd) -> Result<Identity, Errno> {
    let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else {
        return Ok(Identity::Descriptor(original));
    };
    if !info.contains("eventfd-count:") {
        return Err(Errno::EINVAL);
    }
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("eventfd-id:")?.trim().parse().ok());
    Ok(id.map_or(Identity::Descriptor(original), Identity::Kernel))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    #[test]
    fn identity_is_the_eventfds_and_not_the_descriptors() {
        let (a, b) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let handle = EventHandle::new(a.as_raw_fd()).unwrap();
        let copy = a.try_clone().unwrap();
        assert!(handle.is_same(&EventHandle::new(copy.as_raw_fd()).unwrap()));
        assert!(!handle.is_same(&EventHandle::new(b.as_raw_fd()).unwrap()));
    }

    #[test]
    fn a_blocking_eventfd_does_not_block() {
        let event = EventFd::new(0).unwrap();
        let handle = EventHandle::new(event.as_raw_fd()).unwrap();
        assert_eq!(handle.take(), None);
        handle.signal();
        handle.signal();
        assert_eq!(handle.take(), Some(2));
        assert_eq!(handle.take(), None);
    }

    #[test]
    fn what_is_no_eventfd() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(
            EventHandle::new(file.as_raw_fd()).unwrap_err(),
            Errno::EINVAL
        );
        assert_eq!(EventHandle::new(-1).unwrap_err(), Errno::EBADF);
    }
}
