//! One KVM, operated by raw ioctls: the kernel's through its descriptors, ours through
//! [`kvm::fds`]. Each side has memory, eventfds and mappings of its own, in the same places.

use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};

use kvm::{Argument, PagingPath, System};
use kvm_bindings::kvm_run;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of memory that slots may be made of.
pub(crate) const MEMORY: usize = 2 << 20;
/// eventfds to be given to the VM.
pub(crate) const EVENTS: usize = 4;

/// Whose ioctls these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Kernel,
    User(PagingPath),
}

/// A number that is not negative, or an errno.
pub(crate) type Answer = Result<i64, i32>;

pub(crate) struct Vcpu {
    pub(crate) fd: RawFd,
    pub(crate) run: NonNull<kvm_run>,
}

pub(crate) struct Side {
    pub(crate) whose: Whose,
    pub(crate) system: RawFd,
    pub(crate) vm: RawFd,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) events: Vec<EventFd>,
    pub(crate) memory: NonNull<u8>,
    run_size: usize,
}

const CREATE_VM: u32 = 0xae01;
const MMAP_SIZE: u32 = 0xae04;

fn map(size: usize, fd: RawFd) -> NonNull<u8> {
    let (flags, fd) = if fd < 0 {
        (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    } else {
        (libc::MAP_SHARED, fd)
    };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let at = unsafe { libc::mmap(ptr::null_mut(), size, prot, flags, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    NonNull::new(at.cast()).unwrap()
}

impl Side {
    /// `None` where there is no such KVM.
    pub(crate) fn open(whose: Whose) -> Option<Side> {
        let system = match whose {
            Whose::User(paging) => kvm::fds::open_system(&System::new(paging)).unwrap(),
            Whose::Kernel => {
                // SAFETY: a constant path.
                let fd = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR) };
                if fd < 0 {
                    return None;
                }
                fd
            }
        };
        let mut side = Side {
            whose,
            system,
            vm: -1,
            vcpus: Vec::new(),
            events: (0..EVENTS)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect(),
            memory: map(MEMORY, -1),
            run_size: 0,
        };
        side.vm = side.ioctl(system, CREATE_VM, 0).unwrap() as RawFd;
        side.run_size = side.ioctl(system, MMAP_SIZE, 0).unwrap() as usize;
        Some(side)
    }

    pub(crate) fn ioctl(&self, fd: RawFd, request: u32, argument: u64) -> Answer {
        if let Whose::User(_) = self.whose {
            let answer = kvm::fds::ioctl(fd, request, Argument::new(argument));
            return answer.expect("a descriptor of ours").map_err(|e| e.0);
        }
        // SAFETY: the arguments are numbers or pointers to structures of the size that the request
        // says, as ours would read and write them too.
        let answer = unsafe { libc::ioctl(fd, u64::from(request) as _, argument) };
        if answer < 0 {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
        }
        Ok(i64::from(answer))
    }

    /// A vCPU came into being.
    pub(crate) fn adopt(&mut self, fd: RawFd) {
        let run = map(self.run_size, fd).cast();
        self.vcpus.push(Vcpu { fd, run });
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: inside the mapping; no guest runs.
        unsafe {
            self.memory
                .as_ptr()
                .add(at)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
    }

    /// A copy of all memory.
    pub(crate) fn dump(&self) -> Vec<u8> {
        let mut copy = vec![0u8; MEMORY];
        // SAFETY: as above.
        unsafe {
            copy.as_mut_ptr()
                .copy_from_nonoverlapping(self.memory.as_ptr(), MEMORY);
        };
        copy
    }

    /// What an eventfd has counted.
    pub(crate) fn take_event(&self, index: usize) -> u64 {
        self.events[index].read().unwrap_or(0)
    }

    pub(crate) fn event_fd(&self, index: usize) -> RawFd {
        self.events[index].as_raw_fd()
    }

    fn close(&self, fd: RawFd) {
        match self.whose {
            Whose::User(_) => kvm::fds::close(fd),
            // SAFETY: the descriptor is ours.
            Whose::Kernel => unsafe {
                libc::close(fd);
            },
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        for vcpu in &self.vcpus {
            // SAFETY: our own mapping.
            unsafe { libc::munmap(vcpu.run.as_ptr().cast(), self.run_size) };
            self.close(vcpu.fd);
        }
        self.close(self.vm);
        self.close(self.system);
        // SAFETY: our own mapping; the VM is gone.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), MEMORY) };
    }
}
