//! Which descriptor stands for which object.
//!
//! Lock order: the registry's lock is a leaf, and no object is dropped under it.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Object, generation};
use crate::vm::Vm;

/// Device and inode.
pub(super) type Identity = (u64, u64);

struct Entry {
    object: Object,
    /// Descriptors of it that are known to be open.
    open: usize,
}

/// The descriptors, and the objects that they stand for.
#[derive(Default)]
pub(super) struct Registry {
    descriptors: HashMap<RawFd, Identity>,
    objects: HashMap<Identity, Entry>,
}

/// An object that nobody can reach any more; to be dropped after the lock.
pub(super) type Gone = Option<Object>;

const BITS: usize = u64::BITS as usize;
/// Descriptors below this have a bit in [`KNOWN`].
const QUICK: usize = 1 << 16;

/// The known descriptors, for those who ask without a lock: each `close` of the program does.
static KNOWN: [AtomicU64; QUICK / BITS] = [const { AtomicU64::new(0) }; QUICK / BITS];

fn bit(fd: RawFd) -> Option<(&'static AtomicU64, u64)> {
    let index = usize::try_from(fd).ok().filter(|i| *i < QUICK)?;
    Some((&KNOWN[index / BITS], 1 << (index % BITS)))
}

/// Whether `fd` is known to be one of ours.
pub fn is_known(fd: RawFd) -> bool {
    match bit(fd) {
        Some((word, bit)) => word.load(Ordering::Relaxed) & bit != 0,
        None => fd >= 0 && read().descriptors.contains_key(&fd),
    }
}

fn registry() -> &'static RwLock<Registry> {
    static REGISTRY: OnceLock<RwLock<Registry>> = OnceLock::new();
    REGISTRY.get_or_init(RwLock::default)
}

pub(super) fn read() -> RwLockReadGuard<'static, Registry> {
    registry().read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn write() -> RwLockWriteGuard<'static, Registry> {
    registry().write().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Whether there is nothing that a descriptor could stand for.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// What a known descriptor stands for.
    pub(super) fn find(&self, fd: RawFd) -> Option<Object> {
        let identity = self.descriptors.get(&fd)?;
        self.objects.get(identity).map(|e| e.object.clone())
    }

    /// The object with this identity.
    pub(super) fn object(&self, identity: Identity) -> Option<Object> {
        self.objects.get(&identity).map(|e| e.object.clone())
    }

    /// The VMs of this process, a child's own after a `fork`.
    pub(super) fn vms(&self) -> Vec<Arc<Vm>> {
        let own = |entry: &Entry| match &entry.object {
            Object::Vm(vm) if vm.shared().generation() == generation() => Some(Arc::clone(vm)),
            _ => None,
        };
        self.objects.values().filter_map(own).collect()
    }

    /// The known descriptors.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.descriptors.keys().copied().collect()
    }

    pub(super) fn identity(&self, fd: RawFd) -> Option<Identity> {
        self.descriptors.get(&fd).copied()
    }

    /// A new object. Its descriptor may have stood for another, that was closed behind our back.
    #[must_use]
    pub(super) fn insert(&mut self, fd: RawFd, identity: Identity, object: Object) -> Gone {
        let gone = self.remove(fd);
        self.objects.insert(identity, Entry { object, open: 1 });
        self.name(fd, identity);
        gone
    }

    /// `fd` is one more descriptor of the object with this identity.
    #[must_use]
    pub(super) fn add(&mut self, fd: RawFd, identity: Identity) -> Gone {
        if self.identity(fd) == Some(identity) {
            return None;
        }
        let gone = self.remove(fd);
        if let Some(entry) = self.objects.get_mut(&identity) {
            entry.open += 1;
            self.name(fd, identity);
        }
        gone
    }

    /// `fd` was closed.
    #[must_use]
    pub(super) fn remove(&mut self, fd: RawFd) -> Gone {
        let identity = self.descriptors.remove(&fd)?;
        if let Some((word, bit)) = bit(fd) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
        let entry = self.objects.get_mut(&identity)?;
        entry.open -= 1;
        if entry.open > 0 {
            return None;
        }
        self.objects.remove(&identity).map(|e| e.object)
    }

    fn name(&mut self, fd: RawFd, identity: Identity) {
        self.descriptors.insert(fd, identity);
        if let Some((word, bit)) = bit(fd) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}
