//! `struct kvm_run` and what lies behind it, as a memfd.
//!
//! The memfd is the vCPU's file descriptor, so that the program's own `mmap` of it shows the same
//! pages (`api.rst`, 5). Offsets in pages:
//!
//! | page | contents                                                         |
//! |------|------------------------------------------------------------------|
//! | 0    | `struct kvm_run`                                                 |
//! | 1    | the data of port accesses ([`kvm_run`]'s `io.data_offset`)       |
//! | 2    | the ring of coalesced accesses; the first vCPU's is the VM's     |
//! | 64   | the dirty ring, where the VM has rings                           |
//!
//! The program and its threads write these pages while the vCPU runs, so nothing here is a
//! reference: fields are read and written by value, `immediate_exit` atomically.
#![expect(unsafe_code, reason = "the pages are shared with the calling program")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;

use crate::errno::Errno;
use crate::fds::VCPU_NAME;

/// Size of a page.
const PAGE: usize = 4096;
/// What `KVM_GET_VCPU_MMAP_SIZE` answers.
pub const MMAP_SIZE: usize = 3 * PAGE;
/// Where the data of port accesses lie.
pub const PORT_DATA_OFFSET: usize = PAGE;
/// Where the dirty ring lies.
const RING_OFFSET: usize = 64 * PAGE;
/// Where the ring of coalesced accesses lies.
pub const COALESCED_OFFSET: usize = 2 * PAGE;

/// The pages of one vCPU.
#[derive(Debug)]
pub struct RunPage {
    fd: OwnedFd,
    base: NonNull<u8>,
    ring: Option<Ring>,
}

/// The dirty ring, where the VM has rings.
#[derive(Clone, Copy, Debug)]
struct Ring {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is shared memory that any thread may touch by value; nothing hands out
// references into it.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Zeroed pages, with a dirty ring of so many bytes, or none.
    pub fn new(ring_bytes: Option<u64>) -> Result<Self, Errno> {
        // SAFETY: a constant name; the result is checked.
        let fd = unsafe { libc::memfd_create(VCPU_NAME.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let ring_len = ring_bytes.unwrap_or(0) as usize;
        let size = match ring_len {
            0 => MMAP_SIZE,
            len => RING_OFFSET + len,
        };
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) } != 0 {
            return Err(Errno::last());
        }
        let base = map(&fd, 0, MMAP_SIZE)?;
        let mut page = Self {
            fd,
            base,
            ring: None,
        };
        if ring_len != 0 {
            page.ring = Some(Ring {
                base: map(&page.fd, RING_OFFSET, ring_len)?,
                len: ring_len,
            });
        }
        Ok(page)
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// `struct kvm_run`, for code that upholds the rules of the module itself.
    pub fn as_ptr(&self) -> NonNull<kvm_run> {
        self.base.cast()
    }

    /// Reads through a pointer to a field that `field` finds.
    pub fn get<T: Copy>(&self, field: impl FnOnce(*mut kvm_run) -> *mut T) -> T {
        // SAFETY: `field` projects into `kvm_run`, which lies in the mapping; plain integers, read by
        // value.
        unsafe { field(self.base.cast().as_ptr()).read_volatile() }
    }

    /// Writes through a pointer to a field that `field` finds.
    pub fn set<T: Copy>(&self, field: impl FnOnce(*mut kvm_run) -> *mut T, value: T) {
        // SAFETY: as for `get`.
        unsafe { field(self.base.cast().as_ptr()).write_volatile(value) }
    }

    /// `immediate_exit`.
    pub fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: one byte of the mapping, which lives as long as `self`; all of Fourfold's accesses
        // to it are atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.as_ptr().as_ptr()).immediate_exit) }
    }

    /// Whether the program wants `KVM_RUN` to return at once.
    pub fn wants_immediate_exit(&self) -> bool {
        self.immediate_exit().load(Ordering::Relaxed) != 0
    }

    /// Copies bytes in at `offset`; what does not fit is dropped.
    pub fn write_bytes(&self, offset: usize, data: &[u8]) {
        let len = data.len().min(MMAP_SIZE.saturating_sub(offset));
        // SAFETY: inside the mapping (checked).
        unsafe {
            self.base
                .add(offset)
                .as_ptr()
                .copy_from_nonoverlapping(data.as_ptr(), len);
        }
    }

    /// Copies `len` bytes out from `offset`, or as many as there are.
    pub fn read_bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let len = len.min(MMAP_SIZE.saturating_sub(offset));
        let mut data = vec![0; len];
        // SAFETY: inside the mapping (checked).
        unsafe {
            data.as_mut_ptr()
                .copy_from_nonoverlapping(self.base.add(offset).as_ptr(), len);
        }
        data
    }

    /// The dirty ring: where, and how many bytes.
    pub fn dirty_ring(&self) -> Option<(addr::Hva, u64)> {
        self.ring
            .map(|ring| (addr::Hva::new(ring.base.as_ptr() as u64), ring.len as u64))
    }

    /// Whether a byte of the file lies in the dirty ring.
    pub fn is_in_dirty_ring(&self, offset: u64) -> bool {
        let start = RING_OFFSET as u64;
        self.ring
            .is_some_and(|ring| (start..start + ring.len as u64).contains(&offset))
    }

    /// The ring page of coalesced accesses.
    pub fn coalesced_ring(&self) -> NonNull<u8> {
        // SAFETY: inside the mapping.
        unsafe { self.base.add(COALESCED_OFFSET) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our own mappings, to which no reference is left.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), MMAP_SIZE);
            if let Some(ring) = self.ring {
                libc::munmap(ring.base.as_ptr().cast(), ring.len);
            }
        }
    }
}

fn map(fd: &OwnedFd, offset: usize, len: usize) -> Result<NonNull<u8>, Errno> {
    // SAFETY: a new mapping of our own descriptor; the kernel chooses the place.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset as i64,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    NonNull::new(base.cast()).ok_or(Errno::ENOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_mapping_shows_the_same_pages() {
        let page = RunPage::new(None).unwrap();
        // SAFETY: fields of `kvm_run` are integers.
        page.set(|run| unsafe { &raw mut (*run).exit_reason }, 7);
        page.write_bytes(PORT_DATA_OFFSET, b"port");
        let other = map(&page.fd.try_clone().unwrap(), 0, MMAP_SIZE).unwrap();
        let run = other.cast::<kvm_run>();
        // SAFETY: a mapping of its own, alive here.
        assert_eq!(unsafe { run.as_ref().exit_reason }, 7);
        page.immediate_exit().store(1, Ordering::Relaxed);
        // SAFETY: as above.
        assert_eq!(unsafe { run.as_ref().immediate_exit }, 1);
        assert_eq!(page.read_bytes(PORT_DATA_OFFSET, 4), b"port");
        assert_eq!(page.read_bytes(MMAP_SIZE - 2, 8).len(), 2);
        // SAFETY: mapped above, no reference left.
        unsafe { libc::munmap(other.as_ptr().cast(), MMAP_SIZE) };
    }
}
