//! File descriptors for the objects: what a program that calls `ioctl` holds.
//!
//! Each object is a real file, a memfd, so that `dup`, `fcntl`, `poll`, passing and closing work on it
//! as on any file; a vCPU's is the memfd of its `kvm_run` pages, which the program maps. The memfd's
//! inode names the object: a descriptor that was made behind our back (`dup2`, `fcntl`, received over
//! a socket) is recognised by its inode, at the price of one `fstat` when it is first used.
//!
//! An object lives while one of its known descriptors is open: [`opened`] and [`closed`] are called
//! by whoever sees the program's `dup` and `close`. A VM that the program closes lives on in its
//! vCPUs; the vCPUs belong to the VM.
//!
//! In another process (after `execve`, or sent over a socket) the memfd's name says what it was:
//! `/dev/kvm` serves there, too, and a VM answers `EIO`, as the kernel's do.
#![expect(unsafe_code, reason = "file descriptors are the C library's")]

mod fork;
mod registry;

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::argument::Argument;
use crate::device::Device;
use crate::errno::Errno;
use crate::guest_memory::{self, GuestMemory};
use crate::system::System;
use crate::table::{Answer, Handler, Level, find};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

pub use fork::follow_forks;
pub(crate) use fork::generation;
pub use registry::is_known;
use registry::{Identity, read, write};

/// What a descriptor stands for.
#[derive(Clone)]
pub enum Object {
    /// `/dev/kvm`.
    System(Arc<System>),
    /// A VM.
    Vm(Arc<Vm>),
    /// A vCPU.
    Vcpu(Arc<Vcpu>),
    /// A device.
    Device(Arc<Device>),
    /// Guest memory of a protected VM.
    Memory(Arc<GuestMemory>),
}

impl Object {
    fn level(&self) -> Level {
        match self {
            Object::System(_) => Level::System,
            Object::Vm(_) => Level::Vm,
            Object::Vcpu(_) => Level::Vcpu,
            // Neither knows a call of its own where the other has one.
            Object::Device(_) | Object::Memory(_) => Level::Device,
        }
    }
}

fn identity(fd: RawFd) -> Option<Identity> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fills in the structure, or fails.
    let stat = unsafe {
        if libc::fstat(fd, stat.as_mut_ptr()) != 0 {
            return None;
        }
        stat.assume_init()
    };
    Some((stat.st_dev, stat.st_ino))
}

/// The names of the memfds, as `/proc/PID/fd` shows them.
const SYSTEM_NAME: &std::ffi::CStr = c"fourfold-kvm";
const VM_NAME: &std::ffi::CStr = c"fourfold-kvm-vm";
pub(crate) const VCPU_NAME: &std::ffi::CStr = c"fourfold-kvm-vcpu";
const DEVICE_NAME: &std::ffi::CStr = c"fourfold-kvm-vfio";

fn memfd(name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: a constant name; the result is checked, and a new descriptor is nobody else's.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(Errno::last());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn register(fd: OwnedFd, object: Object) -> Result<RawFd, Errno> {
    let identity = identity(fd.as_raw_fd()).ok_or(Errno::EBADF)?;
    let fd = fd.into_raw_fd();
    let gone = write().insert(fd, identity, object);
    drop(gone);
    Ok(fd)
}

/// A descriptor for `/dev/kvm`. The caller owns it, and closes it with [`close`].
pub fn open_system(system: &Arc<System>) -> Result<RawFd, Errno> {
    register(memfd(SYSTEM_NAME)?, Object::System(Arc::clone(system)))
}

/// A descriptor for a VM.
pub fn open_vm(vm: &Arc<Vm>) -> Result<RawFd, Errno> {
    register(memfd(VM_NAME)?, Object::Vm(Arc::clone(vm)))
}

/// A descriptor for a vCPU: its `kvm_run` pages.
pub fn open_vcpu(vcpu: &Arc<Vcpu>) -> Result<RawFd, Errno> {
    let fd = vcpu.run_page().fd().try_clone_to_owned()?;
    register(fd, Object::Vcpu(Arc::clone(vcpu)))
}

/// A descriptor for a device.
pub fn open_device(device: &Arc<Device>) -> Result<RawFd, Errno> {
    register(memfd(DEVICE_NAME)?, Object::Device(Arc::clone(device)))
}

/// A descriptor for guest memory.
pub fn open_memory(memory: &Arc<GuestMemory>) -> Result<RawFd, Errno> {
    register(memory.name()?, Object::Memory(Arc::clone(memory)))
}

/// Whether there is a file of any kind.
pub(crate) fn is_open(fd: RawFd) -> bool {
    identity(fd).is_some()
}

/// `fallocate` on a descriptor; `None` where it is not one of guest memory.
pub fn fallocate(fd: RawFd, mode: i32, offset: i64, len: i64) -> Option<Result<(), Errno>> {
    match find_object(fd)? {
        Object::Memory(memory) => Some(memory.fallocate(mode, offset, len)),
        _ => None,
    }
}

/// What `fd` stands for; `None` for a descriptor that is not ours.
pub fn find_object(fd: RawFd) -> Option<Object> {
    if is_known(fd) {
        return read().find(fd);
    }
    if read().is_empty() {
        return None;
    }
    adopt(fd, identity(fd)?)
}

/// A descriptor that was made behind our back.
fn adopt(fd: RawFd, identity: Identity) -> Option<Object> {
    let mut registry = write();
    let object = registry.object(identity)?;
    let gone = registry.add(fd, identity);
    drop(registry);
    drop(gone);
    Some(object)
}

/// What an unknown descriptor was in the process that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// `/dev/kvm`: [`adopt_system`] makes it work here.
    System,
    /// A VM, a vCPU or a device of another process.
    Foreign,
}

/// Looks at the name of the file behind `fd`.
pub fn inherited(fd: RawFd) -> Option<Inherited> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let name = link.to_str()?.strip_prefix("/memfd:")?;
    let name = name.strip_suffix(" (deleted)").unwrap_or(name).as_bytes();
    if name == SYSTEM_NAME.to_bytes() {
        return Some(Inherited::System);
    }
    let foreign = [VM_NAME, VCPU_NAME, DEVICE_NAME, guest_memory::NAME];
    (foreign.iter().any(|known| name == known.to_bytes())).then_some(Inherited::Foreign)
}

/// Makes an inherited descriptor of `/dev/kvm` one of this process.
pub fn adopt_system(fd: RawFd, system: &Arc<System>) -> Result<(), Errno> {
    let identity = identity(fd).ok_or(Errno::EBADF)?;
    let gone = write().insert(fd, identity, Object::System(Arc::clone(system)));
    drop(gone);
    Ok(())
}

/// The descriptors that are known to be ours.
pub fn known() -> Vec<RawFd> {
    read().descriptors()
}

/// The program has made `new` a copy of `old`, if that is one of ours.
pub fn opened(old: RawFd, new: RawFd) {
    let mut registry = write();
    let gone = match registry.identity(old) {
        Some(identity) => registry.add(new, identity),
        None => None,
    };
    drop(registry);
    drop(gone);
}

/// The program has closed `fd`, if that was one of ours (`dup2` closes its target).
pub fn closed(fd: RawFd) {
    let gone = write().remove(fd);
    // Outside the lock: the end of a VM waits for its threads.
    drop(gone);
}

/// Closes one of our descriptors.
pub fn close(fd: RawFd) {
    closed(fd);
    // SAFETY: the caller gives the descriptor up.
    unsafe { libc::close(fd) };
}

/// The part of a file that `mmap` is to map, and how.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// First byte of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// `PROT_*`.
    pub protection: i32,
    /// `MAP_*`.
    pub flags: i32,
}

impl Mapping {
    fn is_shared(&self) -> bool {
        // MAP_SHARED_VALIDATE contains MAP_SHARED's bit.
        self.flags & libc::MAP_SHARED != 0
    }

    fn is_executable(&self) -> bool {
        self.protection & libc::PROT_EXEC != 0
    }
}

/// The errno by which the kernel refuses this `mmap` of an object, if it does: only vCPUs can be
/// mapped, and a dirty ring only as shared data.
pub fn refuses_mapping(object: &Object, mapping: &Mapping) -> Option<Errno> {
    let Object::Vcpu(vcpu) = object else {
        return Some(Errno::ENODEV);
    };
    let last = mapping.offset.saturating_add(mapping.len.saturating_sub(1));
    let page = vcpu.run_page();
    let touches_ring = page.is_in_dirty_ring(mapping.offset) || page.is_in_dirty_ring(last);
    let plain = mapping.is_shared() && !mapping.is_executable();
    (touches_ring && !plain).then_some(Errno::EINVAL)
}

/// `ioctl` on an object.
pub fn dispatch(object: &Object, request: u32, argument: Argument) -> Answer {
    let born = match object {
        Object::System(_) => generation(),
        Object::Vm(vm) => vm.shared().generation(),
        Object::Vcpu(vcpu) => vcpu.vm().generation(),
        Object::Device(device) => device.generation(),
        Object::Memory(memory) => memory.generation(),
    };
    if born != generation() {
        return Err(Errno::EIO);
    }
    let row = find(object.level(), request).ok_or_else(|| object.level().unknown())?;
    match (row.handler, object) {
        (Handler::System(call), Object::System(system)) => call(system, argument),
        (Handler::Vm(call), Object::Vm(vm)) => call(vm, argument),
        (Handler::Vcpu(call), Object::Vcpu(vcpu)) => call(vcpu, argument),
        (Handler::Device(call), Object::Device(device)) => call(device, argument),
        _ => Err(object.level().unknown()),
    }
}

/// `ioctl` on a descriptor; `None` where it is not one of ours.
pub fn ioctl(fd: RawFd, request: u32, argument: Argument) -> Option<Answer> {
    find_object(fd).map(|object| dispatch(&object, request, argument))
}

/// The VMs of this process, in the order in which they were made.
pub fn vms() -> Vec<Arc<Vm>> {
    let mut vms = read().vms();
    vms.sort_by_key(|vm| vm.shared().serial());
    vms
}
