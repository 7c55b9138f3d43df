//! Memory slots and dirty logs, as the ioctls give them.

use std::os::fd::RawFd;
use std::sync::Arc;

use ::memory::access;
use ::memory::slot::{ClearLog, Inside, ManualProtect, Region};
use addr::{Gpa, Hva, PageSize};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_clear_dirty_log, kvm_create_guest_memfd, kvm_dirty_log, kvm_memory_attributes,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};

use super::protected::Source;
use super::{Shared, Vm};
use crate::errno::Errno;
use crate::fds::{self, Object};
use crate::guest_memory::GuestMemory;

/// Least argument of `KVM_SET_NR_MMU_PAGES`.
const MIN_MMU_PAGES: u64 = 64;
/// The three pages of `KVM_SET_TSS_ADDR` end below 4 GiB.
const MAX_TSS_ADDRESS: u64 = 0xffff_d000;

impl Shared {
    /// Eight bytes of guest memory.
    pub(crate) fn read_guest_u64(&self, gpa: Gpa) -> Option<u64> {
        let table = self.slots.snapshot(0);
        let hva = table.find(gpa.frame())?.hva_at(gpa)?;
        access::load(hva, 8).ok()
    }
}

impl Vm {
    /// `KVM_SET_USER_MEMORY_REGION`.
    pub fn set_user_memory_region(
        &self,
        region: &kvm_userspace_memory_region,
    ) -> Result<(), Errno> {
        if region.flags & !(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY) != 0 {
            return Err(Errno::EINVAL);
        }
        self.set_region(Region {
            slot: region.slot,
            flags: region.flags,
            gpa: Gpa::new(region.guest_phys_addr),
            size: region.memory_size,
            hva: Hva::new(region.userspace_addr),
        })
    }

    /// `KVM_SET_USER_MEMORY_REGION2`: also with private memory, in a protected VM.
    pub fn set_user_memory_region2(
        &self,
        region: &kvm_userspace_memory_region2,
    ) -> Result<(), Errno> {
        let asked = Region {
            slot: region.slot,
            flags: region.flags,
            gpa: Gpa::new(region.guest_phys_addr),
            size: region.memory_size,
            hva: Hva::new(region.userspace_addr),
        };
        let Some(protected) = &self.shared.protected else {
            return self.set_region(asked);
        };
        let private = region.flags & KVM_MEM_GUEST_MEMFD != 0;
        let known = if private {
            KVM_MEM_GUEST_MEMFD
        } else {
            KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
        };
        if region.flags & !known != 0 {
            return Err(Errno::EINVAL);
        }
        let source = (private && region.memory_size != 0)
            .then(|| private_source(region))
            .transpose()?;
        protected.set_region(&self.shared, &asked, source)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub fn set_memory_attributes(&self, asked: &kvm_memory_attributes) -> Result<(), Errno> {
        const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;
        let known = match self.shared.protected {
            Some(_) => PRIVATE,
            None => 0,
        };
        let page = PageSize::Size4K.bytes();
        let end = asked.address.checked_add(asked.size).ok_or(Errno::EINVAL)?;
        let aligned = asked.address.is_multiple_of(page) && asked.size.is_multiple_of(page);
        if asked.flags != 0 || asked.attributes & !known != 0 || asked.size == 0 || !aligned {
            return Err(Errno::EINVAL);
        }
        let Some(protected) = &self.shared.protected else {
            return Ok(());
        };
        let inside = match asked.attributes & PRIVATE {
            0 => Inside::No,
            _ => Inside::Yes,
        };
        protected.set_private(&self.shared, &(asked.address / page..end / page), inside)
    }

    /// `KVM_CREATE_GUEST_MEMFD`.
    pub fn create_guest_memory(
        &self,
        request: &kvm_create_guest_memfd,
    ) -> Result<Arc<GuestMemory>, Errno> {
        GuestMemory::new(&self.shared, request)
    }

    fn set_region(&self, region: Region) -> Result<(), Errno> {
        if let Some(protected) = &self.shared.protected {
            return protected.set_region(&self.shared, &region, None);
        }
        let changed = self.shared.slots.set_region(&region);
        self.shared.refresh_stats();
        changed.map(drop).map_err(|error| Errno(error.errno()))
    }

    /// `KVM_GET_DIRTY_LOG` into the program's bitmap.
    pub fn get_dirty_log(&self, log: &kvm_dirty_log) -> Result<(), Errno> {
        let into = Hva::new(bitmap_of(log));
        let done = if let Some(protected) = &self.shared.protected {
            let words = protected.harvest(&self.shared, log.slot);
            words.and_then(|words| access::write_words(into, &words).map_err(|_| Errno::EFAULT))
        } else {
            let done = self.shared.slots.get_dirty_log(log.slot, into);
            done.map_err(|error| Errno(error.errno()))
        };
        self.shared.refresh_stats();
        done
    }

    /// `KVM_GET_DIRTY_LOG` for callers of the crate.
    pub fn dirty_log(&self, slot: u32) -> Result<Vec<u64>, Errno> {
        if let Some(protected) = &self.shared.protected {
            return protected.harvest(&self.shared, slot);
        }
        let harvested = self.shared.slots.harvest(slot);
        harvested.map_err(|error| Errno(error.errno()))
    }

    /// `KVM_CLEAR_DIRTY_LOG`.
    pub fn clear_dirty_log(&self, log: &kvm_clear_dirty_log) -> Result<(), Errno> {
        let clear = ClearLog {
            slot: log.slot,
            first_page: log.first_page,
            num_pages: log.num_pages,
            bitmap: Hva::new(clear_bitmap_of(log)),
        };
        let done = if let Some(protected) = &self.shared.protected {
            protected.clear(&self.shared, &clear)
        } else {
            let done = self.shared.slots.clear_dirty_log(&clear);
            done.map_err(|error| Errno(error.errno()))
        };
        self.shared.refresh_stats();
        done
    }

    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    pub(super) fn set_manual_protect(&self, argument: u64) -> Result<(), Errno> {
        let mode = ManualProtect::from_argument(argument).ok_or(Errno::EINVAL)?;
        self.shared.slots.set_manual_protect(mode);
        Ok(())
    }

    /// `KVM_CAP_DIRTY_LOG_RING`: a ring of so many bytes for each vCPU to come.
    pub(super) fn enable_dirty_ring(&self, bytes: u64) -> Result<(), Errno> {
        let bytes = u64::from(bytes as u32);
        let enabled = self.locked_without_vcpus(|| self.shared.slots.enable_dirty_ring(bytes))?;
        enabled.map_err(|error| Errno(error.errno()))
    }

    /// `KVM_RESET_DIRTY_RINGS`: takes back what the program has collected; how many entries.
    pub fn reset_dirty_rings(&self) -> Result<u32, Errno> {
        if self.shared.slots.dirty_ring_bytes().is_none() {
            return Err(Errno::EINVAL);
        }
        self.shared
            .mmu()
            .reset_dirty_rings()
            .map_err(|_| Errno::EFAULT)
    }

    /// `KVM_SET_NR_MMU_PAGES`: the most shadow pages. Nested tables are bounded by the slots, here as
    /// in the kernel.
    pub fn set_nr_mmu_pages(&self, pages: u64) -> Result<(), Errno> {
        if pages < MIN_MMU_PAGES {
            return Err(Errno::EINVAL);
        }
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        self.shared.mmu().set_shadow_limit(pages);
        Ok(())
    }

    /// `KVM_SET_TSS_ADDR`: Intel's hardware needs three pages for real mode; this CPU does not.
    pub fn set_tss_address(&self, address: u64) -> Result<(), Errno> {
        if address > MAX_TSS_ADDRESS {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// `KVM_SET_IDENTITY_MAP_ADDR`: the same, for one page; before there are vCPUs.
    pub fn set_identity_map_address(&self, _address: u64) -> Result<(), Errno> {
        if self.has_vcpus() {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }
}

/// The private memory that a region names.
fn private_source(region: &kvm_userspace_memory_region2) -> Result<Source, Errno> {
    let offset = region.guest_memfd_offset;
    let aligned = offset.is_multiple_of(PageSize::Size4K.bytes());
    if !aligned || offset.checked_add(region.memory_size).is_none() {
        return Err(Errno::EINVAL);
    }
    let fd = RawFd::try_from(region.guest_memfd).map_err(|_| Errno::EBADF)?;
    match fds::find_object(fd) {
        Some(Object::Memory(memory)) => Ok(Source { memory, offset }),
        Some(_) => Err(Errno::EINVAL),
        None if fds::is_open(fd) => Err(Errno::EINVAL),
        None => Err(Errno::EBADF),
    }
}

#[expect(
    unsafe_code,
    reason = "the pointer is one member of a union with an integer"
)]
fn bitmap_of(log: &kvm_dirty_log) -> u64 {
    // SAFETY: both members are eight bytes of plain data.
    unsafe { log.__bindgen_anon_1.padding2 }
}

#[expect(
    unsafe_code,
    reason = "the pointer is one member of a union with an integer"
)]
fn clear_bitmap_of(log: &kvm_clear_dirty_log) -> u64 {
    // SAFETY: both members are eight bytes of plain data.
    unsafe { log.__bindgen_anon_1.padding2 }
}
