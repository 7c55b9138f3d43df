//! The VM's clock: `KVM_GET_CLOCK`, `KVM_SET_CLOCK`, the wall clock.

use std::sync::atomic::Ordering;

use ::memory::access;
use addr::{Address, Gpa, Hva, PageSize};
use kvm_bindings::kvm_clock_data;

use super::{Shared, Vm};
use crate::clock::kvmclock::KvmClock;
use crate::clock::memory::{GuestMemory, NoMemory};
use crate::errno::Errno;

impl Shared {
    /// The clock.
    pub fn clock(&self) -> &KvmClock {
        &self.clock
    }

    /// Grows with every `KVM_SET_CLOCK`.
    pub(crate) fn clock_generation(&self) -> u64 {
        self.clock_generation.load(Ordering::Acquire)
    }

    /// Where the guest wanted its wall clock.
    pub(crate) fn wall_clock(&self) -> Gpa {
        Gpa::new(self.wall_clock.load(Ordering::Relaxed))
    }

    /// The guest says where it wants its wall clock: written once, now. An address in no memory is
    /// the guest's mistake, and ignored as in the kernel.
    pub(crate) fn write_wall_clock(&self, page: Gpa) {
        self.wall_clock.store(page.raw(), Ordering::Relaxed);
        if page.raw() != 0 {
            let _ = self.clock.write_wall_clock(self, page);
        }
    }

    /// Calls `piece` for each part of a guest range that lies in one page.
    fn in_pages(
        &self,
        gpa: Gpa,
        len: usize,
        mut piece: impl FnMut(Hva, std::ops::Range<usize>) -> Result<(), access::HostFault>,
    ) -> Result<(), NoMemory> {
        let table = self.slots.snapshot(0);
        let mut done = 0;
        while done < len {
            let at = gpa.checked_add(done as u64).ok_or(NoMemory(gpa))?;
            let in_page = (4096 - at.page_offset(PageSize::Size4K)) as usize;
            let part = in_page.min(len - done);
            let slot = table.find(at.frame()).ok_or(NoMemory(at))?;
            let hva = slot.hva_at(at).ok_or(NoMemory(at))?;
            piece(hva, done..done + part).map_err(|_| NoMemory(at))?;
            done += part;
        }
        Ok(())
    }
}

impl GuestMemory for Shared {
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), NoMemory> {
        self.in_pages(gpa, data.len(), |hva, part| {
            access::read(hva, &mut data[part])
        })
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), NoMemory> {
        self.in_pages(gpa, data.len(), |hva, part| access::write(hva, &data[part]))?;
        let table = self.slots.snapshot(0);
        for frame in [
            gpa.frame(),
            gpa.wrapping_add(data.len().max(1) as u64 - 1).frame(),
        ] {
            if let Some(slot) = table.find(frame) {
                slot.mark_dirty(frame);
            }
        }
        Ok(())
    }
}

impl Vm {
    /// `KVM_GET_CLOCK`.
    pub fn get_clock(&self) -> kvm_clock_data {
        self.shared.clock.get()
    }

    /// `KVM_SET_CLOCK`.
    pub fn set_clock(&self, data: &kvm_clock_data) -> Result<(), Errno> {
        self.shared.clock.set(data)?;
        self.shared.clock_generation.fetch_add(1, Ordering::Release);
        Ok(())
    }
}
