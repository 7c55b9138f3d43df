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
#![expect(unsafe_code, reason = "file descriptors are the C library's")]

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::argument::Argument;
use crate::errno::Errno;
use crate::system::System;
use crate::table::{Answer, Handler, Level, find};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// What a descriptor stands for.
#[derive(Clone)]
pub enum Object {
    /// `/dev/kvm`.
    System(Arc<System>),
    /// A VM.
    Vm(Arc<Vm>),
    /// A vCPU.
    Vcpu(Arc<Vcpu>),
}

impl Object {
    fn level(&self) -> Level {
        match self {
            Object::System(_) => Level::System,
            Object::Vm(_) => Level::Vm,
            Object::Vcpu(_) => Level::Vcpu,
        }
    }
}

/// Device and inode.
type Identity = (u64, u64);

struct Entry {
    object: Object,
    /// Descriptors of it that are known to be open.
    open: usize,
}

#[derive(Default)]
struct Registry {
    descriptors: HashMap<RawFd, Identity>,
    objects: HashMap<Identity, Entry>,
}

fn registry() -> &'static RwLock<Registry> {
    static REGISTRY: OnceLock<RwLock<Registry>> = OnceLock::new();
    REGISTRY.get_or_init(RwLock::default)
}

fn read() -> RwLockReadGuard<'static, Registry> {
    registry().read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Registry> {
    registry().write().unwrap_or_else(PoisonError::into_inner)
}

/// How many `fork`s lie between this process and the first.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// To be called in the child of a `fork`: as in the kernel, the VMs of the parent answer `EIO`.
pub fn forked() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// The generation of what is made now.
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
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
    let mut registry = write();
    registry.objects.insert(identity, Entry { object, open: 1 });
    registry.descriptors.insert(fd, identity);
    Ok(fd)
}

/// A descriptor for `/dev/kvm`. The caller owns it, and closes it with [`close`].
pub fn open_system(system: &Arc<System>) -> Result<RawFd, Errno> {
    register(memfd(c"kvm")?, Object::System(Arc::clone(system)))
}

/// A descriptor for a VM.
pub fn open_vm(vm: &Arc<Vm>) -> Result<RawFd, Errno> {
    register(memfd(c"kvm-vm")?, Object::Vm(Arc::clone(vm)))
}

/// A descriptor for a vCPU: its `kvm_run` pages.
pub fn open_vcpu(vcpu: &Arc<Vcpu>) -> Result<RawFd, Errno> {
    let fd = vcpu.run_page().fd().try_clone_to_owned()?;
    register(fd, Object::Vcpu(Arc::clone(vcpu)))
}

/// What `fd` stands for; `None` for a descriptor that is not ours.
pub fn find_object(fd: RawFd) -> Option<Object> {
    {
        let registry = read();
        if let Some(identity) = registry.descriptors.get(&fd) {
            return registry.objects.get(identity).map(|e| e.object.clone());
        }
        if registry.objects.is_empty() {
            return None;
        }
    }
    adopt(fd, identity(fd)?)
}

/// A descriptor that was made behind our back.
fn adopt(fd: RawFd, identity: Identity) -> Option<Object> {
    let mut registry = write();
    let entry = registry.objects.get_mut(&identity)?;
    entry.open += 1;
    let object = entry.object.clone();
    registry.descriptors.insert(fd, identity);
    Some(object)
}

/// Whether `fd` is known to be one of ours; takes no lock but for reading.
pub fn is_known(fd: RawFd) -> bool {
    read().descriptors.contains_key(&fd)
}

/// The descriptors that are known to be ours.
pub fn known() -> Vec<RawFd> {
    read().descriptors.keys().copied().collect()
}

/// The program has made `new` a copy of `old`, if that is one of ours.
pub fn opened(old: RawFd, new: RawFd) {
    let mut registry = write();
    let Some(identity) = registry.descriptors.get(&old).copied() else {
        return;
    };
    if registry.descriptors.insert(new, identity) == Some(identity) {
        return;
    }
    if let Some(entry) = registry.objects.get_mut(&identity) {
        entry.open += 1;
    }
}

/// The program has closed `fd`, if that was one of ours (`dup2` closes its target).
pub fn closed(fd: RawFd) {
    let mut registry = write();
    let Some(identity) = registry.descriptors.remove(&fd) else {
        return;
    };
    let Some(entry) = registry.objects.get_mut(&identity) else {
        return;
    };
    entry.open -= 1;
    let gone = (entry.open == 0).then(|| registry.objects.remove(&identity));
    drop(registry);
    // Outside the lock: the end of a VM waits for its threads.
    drop(gone);
}

/// Closes one of our descriptors.
pub fn close(fd: RawFd) {
    closed(fd);
    // SAFETY: the caller gives the descriptor up.
    unsafe { libc::close(fd) };
}

/// `ioctl` on an object.
pub fn dispatch(object: &Object, request: u32, argument: Argument) -> Answer {
    let born = match object {
        Object::System(_) => generation(),
        Object::Vm(vm) => vm.shared().generation(),
        Object::Vcpu(vcpu) => vcpu.vm().generation(),
    };
    if born != generation() {
        return Err(Errno::EIO);
    }
    let row = find(object.level(), request).ok_or_else(|| object.level().unknown())?;
    match (row.handler, object) {
        (Handler::System(call), Object::System(system)) => call(system, argument),
        (Handler::Vm(call), Object::Vm(vm)) => call(vm, argument),
        (Handler::Vcpu(call), Object::Vcpu(vcpu)) => call(vcpu, argument),
        _ => Err(object.level().unknown()),
    }
}

/// `ioctl` on a descriptor; `None` where it is not one of ours.
pub fn ioctl(fd: RawFd, request: u32, argument: Argument) -> Option<Answer> {
    find_object(fd).map(|object| dispatch(&object, request, argument))
}
