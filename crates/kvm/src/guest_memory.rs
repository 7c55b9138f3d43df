//! `KVM_CREATE_GUEST_MEMFD`: memory that a guest reaches and its monitor does not.
//!
//! The memory is a mapping of our own. The descriptor that the program gets only names it: a sealed
//! memfd of the same size, open for writing alone, which can be neither read, written nor mapped;
//! `fallocate` on it comes to [`GuestMemory::allocate`] and [`GuestMemory::punch_hole`]. What the kernel
//! promises of a protected VM in software is a matter of bookkeeping, as it is here: a debugger of the
//! process finds the memory all the same.

#![expect(unsafe_code, reason = "madvise, memfds and their seals")]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ::memory::ram::{GuestRam, RamConfig};
use addr::{Address, Hva, PageSize};
use kvm_bindings::kvm_create_guest_memfd;

use crate::errno::Errno;
use crate::vm::Shared;

/// The name of the descriptor's memfd, as `/proc/PID/fd` shows it.
pub(crate) const NAME: &std::ffi::CStr = c"fourfold-kvm-memory";

const PAGE: u64 = PageSize::Size4K.bytes();

/// One guest memory file.
pub struct GuestMemory {
    ram: GuestRam,
    /// The VM that it belongs to.
    vm: Weak<Shared>,
    generation: u32,
    /// The parts that slots use, in bytes.
    bound: Mutex<Vec<Range<u64>>>,
}

impl GuestMemory {
    pub(crate) fn new(
        vm: &Arc<Shared>,
        request: &kvm_create_guest_memfd,
    ) -> Result<Arc<Self>, Errno> {
        let size = request.size;
        let signed = i64::try_from(size).is_ok();
        if request.flags != 0 || size == 0 || !signed || !size.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        let ram = GuestRam::new(&RamConfig::private(size)).map_err(|_| Errno::ENOMEM)?;
        Ok(Arc::new(Self {
            ram,
            vm: Arc::downgrade(vm),
            generation: vm.generation(),
            bound: Mutex::default(),
        }))
    }

    /// A descriptor that names it.
    pub(crate) fn name(&self) -> Result<OwnedFd, Errno> {
        // SAFETY: a constant name; the result is checked, and a new descriptor is nobody else's.
        let file = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            let fd = libc::memfd_create(NAME.as_ptr(), flags);
            if fd < 0 {
                return Err(Errno::last());
            }
            File::from_raw_fd(fd)
        };
        file.set_len(self.ram.size())?;
        let seals =
            libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: no pointers.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(Errno::last());
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(File::options().write(true).open(path)?.into())
    }

    /// The process that made it.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// Takes a part for a slot of `vm`; where it lies in this process.
    pub(crate) fn bind(&self, vm: &Arc<Shared>, offset: u64, size: u64) -> Result<Hva, Errno> {
        let end = offset.checked_add(size).ok_or(Errno::EINVAL)?;
        let ours = std::ptr::eq(self.vm.as_ptr(), Arc::as_ptr(vm));
        if !ours || !offset.is_multiple_of(PAGE) || end > self.ram.size() {
            return Err(Errno::EINVAL);
        }
        let mut bound = self.bound();
        if bound.iter().any(|b| b.start < end && offset < b.end) {
            return Err(Errno::EEXIST);
        }
        bound.push(offset..end);
        Ok(self.ram.hva().wrapping_add(offset))
    }

    /// Gives a part back.
    pub(crate) fn unbind(&self, part: &Range<u64>) {
        self.bound().retain(|b| b != part);
    }

    /// `fallocate` with these flags.
    pub fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<(), Errno> {
        let (Ok(offset), Ok(len @ 1..)) = (u64::try_from(offset), u64::try_from(len)) else {
            return Err(Errno::EINVAL);
        };
        let known = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 || mode & !known != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(Errno::EINVAL);
        }
        let part = offset..offset.saturating_add(len);
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            self.punch_hole(part)
        } else {
            self.allocate(part)
        }
    }

    /// Provides the pages of a part.
    fn allocate(&self, part: Range<u64>) -> Result<(), Errno> {
        if part.end > self.ram.size() {
            return Err(Errno::EINVAL);
        }
        self.advise(part, libc::MADV_POPULATE_WRITE)
    }

    /// Gives the pages of a part back: they are zero when the guest comes again.
    fn punch_hole(&self, part: Range<u64>) -> Result<(), Errno> {
        let part = part.start.min(self.ram.size())..part.end.min(self.ram.size());
        self.advise(part, libc::MADV_DONTNEED)
    }

    fn advise(&self, part: Range<u64>, advice: libc::c_int) -> Result<(), Errno> {
        if part.is_empty() {
            return Ok(());
        }
        let start = self.ram.hva().wrapping_add(part.start).raw() as *mut libc::c_void;
        // SAFETY: a part of a mapping of ours, which only guests and this call reach.
        let done = unsafe { libc::madvise(start, (part.end - part.start) as usize, advice) };
        if done == 0 {
            Ok(())
        } else {
            Err(Errno::last())
        }
    }

    fn bound(&self) -> std::sync::MutexGuard<'_, Vec<Range<u64>>> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
