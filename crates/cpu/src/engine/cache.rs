//! The code cache: one memfd mapped twice, once to write and once to run.
//!
//! No page is ever writable and executable at one address. Space is handed out from the front and
//! taken back only as a whole.

#![expect(unsafe_code, reason = "maps and writes executable memory")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A vCPU's private code cache.
#[derive(Debug)]
pub(crate) struct CodeCache {
    write: *mut u8,
    run: *const u8,
    size: usize,
    used: usize,
    /// Up to here both mappings have their pages.
    touched: usize,
}

/// So much space gets its pages at once: one by one, each costs two page faults.
const STEP: usize = 256 * 1024;

// SAFETY: the mappings belong to the value and are not tied to a thread.
unsafe impl Send for CodeCache {}

fn map(fd: &OwnedFd, size: usize, protection: i32) -> io::Result<*mut u8> {
    // SAFETY: a fresh shared mapping, no address prescribed.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            protection,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(address.cast())
    }
}

impl CodeCache {
    /// A cache of `size` bytes, at most 1 GiB so that its jumps reach.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        // SAFETY: a constant name; the descriptor is owned from here on.
        let fd = unsafe {
            let fd = libc::memfd_create(c"fourfold-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: a descriptor of our own.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let write = map(&fd, size, libc::PROT_READ | libc::PROT_WRITE)?;
        let run = match map(&fd, size, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(run) => run,
            Err(error) => {
                // SAFETY: mapped above with this size.
                unsafe { libc::munmap(write.cast(), size) };
                return Err(error);
            }
        };
        Ok(Self {
            write,
            run,
            size,
            used: 0,
            touched: 0,
        })
    }

    /// Where offset 0 runs.
    pub(crate) fn base(&self) -> u64 {
        self.run as u64
    }

    /// The offset of the next free byte.
    pub(crate) fn used(&self) -> u32 {
        self.used as u32
    }

    /// Whether `bytes` more fit.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.size - self.used >= bytes
    }

    /// The offset of an address of running code, where it is in this cache.
    pub(crate) fn offset_of(&self, pc: u64) -> Option<u32> {
        pc.checked_sub(self.base())
            .filter(|o| *o < self.used as u64)
            .map(|o| o as u32)
    }

    /// The range of addresses at which code runs.
    pub(crate) fn range(&self) -> (u64, u64) {
        (self.base(), self.base() + self.size as u64)
    }

    /// The code between two offsets.
    pub(crate) fn code(&self, start: u32, end: u32) -> &[u8] {
        assert!(start <= end && end as usize <= self.used);
        // SAFETY: inside the mapping, and written; `&self` keeps everyone from changing it.
        unsafe {
            std::slice::from_raw_parts(self.write.add(start as usize), (end - start) as usize)
        }
    }

    /// Appends code; its offset. The caller has asked [`Self::has_room`].
    pub(crate) fn push(&mut self, code: &[u8]) -> u32 {
        assert!(self.has_room(code.len()));
        let offset = self.used;
        if offset + code.len() > self.touched {
            self.touch();
        }
        self.write(offset, code);
        self.used += code.len();
        offset as u32
    }

    /// Has the host give pages to what is used next. Where it can't (before Linux 5.14), they come one
    /// by one.
    fn touch(&mut self) {
        let length = STEP.min(self.size - self.touched);
        let populate = |start: *mut u8, advice| {
            // SAFETY: inside the mapping; contents stay as they are.
            unsafe { libc::madvise(start.add(self.touched).cast(), length, advice) };
        };
        populate(self.write, libc::MADV_POPULATE_WRITE);
        populate(self.run.cast_mut(), libc::MADV_POPULATE_READ);
        self.touched += length;
    }

    /// Takes back all space behind `used`.
    pub(crate) fn truncate(&mut self, used: u32) {
        self.used = used as usize;
    }

    fn write(&mut self, offset: usize, code: &[u8]) {
        assert!(offset + code.len() <= self.size);
        // SAFETY: inside the mapping; the code runs only in this thread, which is here now.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(offset), code.len()) };
    }

    /// Lets the `jmp` or `jcc` whose 32-bit displacement lies at `at` lead to `target`.
    pub(crate) fn patch_jump(&mut self, at: u32, target: u32) {
        let displacement = target.wrapping_sub(at + 4) as i32;
        self.write(at as usize, &displacement.to_le_bytes());
    }

    /// Overwrites the code at `at` with a jump to `target`.
    pub(crate) fn write_jump(&mut self, at: u32, target: u32) {
        self.write(at as usize, &[0xe9]);
        self.patch_jump(at + 1, target);
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both mapped by `new` with this size; code in it runs only through `self`.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.run.cast_mut().cast(), self.size);
        }
    }
}
