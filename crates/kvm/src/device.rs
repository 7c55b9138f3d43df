//! `KVM_CREATE_DEVICE`: the one kind of device that x86 has, VFIO's (`virt/kvm/vfio.c`,
//! `Documentation/virt/kvm/devices/vfio.rst`).
//!
//! It tells KVM which VFIO groups and devices a VM has. The kernel takes from it whether their DMA is
//! coherent, and lends them the VM; neither concerns a KVM in user space: DMA goes by the mappings that
//! the monitor gives VFIO itself, interrupts come by irqfds. So the files are checked and kept.

use std::fs::read_link;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_CREATE_DEVICE_TEST, KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL,
    kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO,
};

use crate::errno::Errno;
use crate::vm::Vm;

/// VFIO's device of a VM.
pub struct Device {
    generation: u32,
    files: Mutex<Vec<OwnedFd>>,
}

/// What a VM knows of its devices.
#[derive(Default)]
pub(crate) struct Devices {
    vfio: Mutex<Weak<Device>>,
}

impl Vm {
    /// `KVM_CREATE_DEVICE`; `None` where it was a test. A VM has one of VFIO's.
    pub fn create_device(&self, request: &kvm_create_device) -> Result<Option<Arc<Device>>, Errno> {
        if request.type_ != kvm_device_type_KVM_DEV_TYPE_VFIO {
            return Err(Errno::ENODEV);
        }
        if request.flags & KVM_CREATE_DEVICE_TEST != 0 {
            return Ok(None);
        }
        let shared = self.shared();
        shared.devices().create(shared.generation()).map(Some)
    }
}

impl Devices {
    fn create(&self, generation: u32) -> Result<Arc<Device>, Errno> {
        let mut vfio = self.vfio.lock().unwrap_or_else(PoisonError::into_inner);
        if vfio.strong_count() > 0 {
            return Err(Errno::EBUSY);
        }
        let device = Arc::new(Device {
            generation,
            files: Mutex::default(),
        });
        *vfio = Arc::downgrade(&device);
        Ok(device)
    }
}

impl Device {
    /// The process that made its VM.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// `KVM_HAS_DEVICE_ATTR`.
    pub fn has_attribute(group: u32, attribute: u64) -> Result<(), Errno> {
        let known = [KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL];
        if group == KVM_DEV_VFIO_FILE && known.iter().any(|known| u64::from(*known) == attribute) {
            Ok(())
        } else {
            Err(Errno::ENXIO)
        }
    }

    /// `KVM_SET_DEVICE_ATTR` of an attribute that it has, with a file of VFIO's.
    pub fn set_attribute(&self, attribute: u64, file: RawFd) -> Result<(), Errno> {
        if attribute == u64::from(KVM_DEV_VFIO_FILE_ADD) {
            self.add(file)
        } else {
            self.remove(file)
        }
    }

    fn add(&self, file: RawFd) -> Result<(), Errno> {
        let target = open_file(file)?;
        if !is_vfio(&target) {
            return Err(Errno::EINVAL);
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.iter().any(|known| is_same(known.as_raw_fd(), file)) {
            return Err(Errno::EEXIST);
        }
        files.push(copy(file)?);
        Ok(())
    }

    fn remove(&self, file: RawFd) -> Result<(), Errno> {
        open_file(file)?;
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let at = files
            .iter()
            .position(|known| is_same(known.as_raw_fd(), file))
            .ok_or(Errno::ENOENT)?;
        files.remove(at);
        Ok(())
    }
}

/// What an open descriptor leads to.
fn open_file(fd: RawFd) -> Result<Vec<u8>, Errno> {
    let link = read_link(format!("/proc/self/fd/{fd}")).map_err(|_| Errno::EBADF)?;
    Ok(link.as_os_str().as_bytes().to_vec())
}

/// A group, or a device of one.
fn is_vfio(target: &[u8]) -> bool {
    target.starts_with(b"/dev/vfio/") && target != b"/dev/vfio/vfio"
        || target == b"anon_inode:[vfio-device]"
}

/// Whether two descriptors are one open file (`kcmp(2)`); where the host has no such call, whether
/// they are one inode.
#[expect(unsafe_code, reason = "kcmp and fstat are the C library's")]
fn is_same(a: RawFd, b: RawFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: compares two descriptors of this process; a bad one is an error.
    unsafe {
        let own = libc::getpid();
        match libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a, b) {
            0 => true,
            order if order > 0 => false,
            _ => {
                let (mut left, mut right) = (std::mem::zeroed::<libc::stat>(), std::mem::zeroed());
                libc::fstat(a, &raw mut left) == 0
                    && libc::fstat(b, &raw mut right) == 0
                    && (left.st_dev, left.st_ino) == (right.st_dev, right.st_ino)
            }
        }
    }
}

#[expect(
    unsafe_code,
    reason = "the descriptor is a number of the calling program's"
)]
fn copy(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: it was open a moment ago, and is only copied.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(file.try_clone_to_owned()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_vfio_are_taken() {
        let device = Devices::default().create(0).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let add = u64::from(KVM_DEV_VFIO_FILE_ADD);
        let del = u64::from(KVM_DEV_VFIO_FILE_DEL);
        assert_eq!(
            device.set_attribute(add, null.as_raw_fd()),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            device.set_attribute(del, null.as_raw_fd()),
            Err(Errno::ENOENT)
        );
        assert_eq!(device.set_attribute(add, -1), Err(Errno::EBADF));
        assert!(is_vfio(b"/dev/vfio/12") && is_vfio(b"anon_inode:[vfio-device]"));
        assert!(!is_vfio(b"/dev/vfio/vfio"));
    }

    #[test]
    fn a_vm_has_one() {
        let devices = Devices::default();
        let first = devices.create(0).unwrap();
        assert_eq!(devices.create(0).err(), Some(Errno::EBUSY));
        drop(first);
        assert!(devices.create(0).is_ok());
    }

    #[test]
    fn a_file_is_itself() {
        let (a, b) = (
            std::fs::File::open("/dev/null").unwrap(),
            std::fs::File::open("/dev/zero").unwrap(),
        );
        let again = a.try_clone().unwrap();
        assert!(is_same(a.as_raw_fd(), again.as_raw_fd()));
        assert!(!is_same(a.as_raw_fd(), b.as_raw_fd()));
    }
}
