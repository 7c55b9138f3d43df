//! Coalesced MMIO and PIO: writes that the monitor may see later (api.rst, 4.16, 4.116).
//!
//! Writes in a registered zone go into a ring in a page that the monitor has mapped, instead of
//! leaving `KVM_RUN`. The ring keeps one entry free, so that empty and full differ. The monitor may
//! write anything into the page at any time; only its two indices are believed, and those checked.

use std::mem::{offset_of, size_of};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cpu::Handled;
use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_coalesced_mmio_zone};

use crate::bus::{Counted, IoBus, IoDevice};
use crate::errno::Errno;

const PAGE: usize = 4096;
/// Entries in the page behind the two indices.
const ENTRIES: u32 =
    ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring's page.
#[derive(Debug)]
struct Page(NonNull<u8>);

// SAFETY: the page is shared memory; all accesses are atomic, or of the entry that `last` reserves
// while `Ring::page`'s lock is held.
#[expect(unsafe_code, reason = "a pointer to shared memory")]
unsafe impl Send for Page {}

/// The ring.
#[derive(Debug, Default)]
pub struct Ring {
    page: Mutex<Option<Page>>,
}

impl Ring {
    /// Gives the ring its page, once: later pages are declined. Without one, nothing is coalesced.
    ///
    /// # Safety
    /// `page` must be a page of memory that can be written for as long as the ring lives.
    #[expect(unsafe_code, reason = "the caller knows how long its mapping lives")]
    pub unsafe fn set_page(&self, page: NonNull<u8>) {
        self.page
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(Page(page));
    }

    fn push(&self, address: u64, data: &[u8], space: Space) -> Handled {
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(page) = &*page else {
            return Handled::No;
        };
        let entry = kvm_coalesced_mmio {
            phys_addr: address,
            len: data.len() as u32,
            data: std::array::from_fn(|i| data.get(i).copied().unwrap_or(0)),
            __bindgen_anon_1: kvm_bindings::kvm_coalesced_mmio__bindgen_ty_1 {
                pio: u32::from(space == Space::Ports),
            },
        };
        if page.push(&entry) {
            Handled::Yes
        } else {
            Handled::No
        }
    }
}

impl Page {
    #[expect(unsafe_code, reason = "shared memory")]
    fn index(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: both indices are aligned words inside the page, which `set_page`'s caller keeps.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }

    #[expect(unsafe_code, reason = "shared memory")]
    fn entries(&self) -> *mut kvm_coalesced_mmio {
        // SAFETY: the entries begin inside the page.
        unsafe {
            self.0
                .as_ptr()
                .add(size_of::<kvm_coalesced_mmio_ring>())
                .cast()
        }
    }

    #[expect(unsafe_code, reason = "shared memory")]
    fn push(&self, entry: &kvm_coalesced_mmio) -> bool {
        let last = self.index(offset_of!(kvm_coalesced_mmio_ring, last));
        let first = self.index(offset_of!(kvm_coalesced_mmio_ring, first));
        let at = last.load(Ordering::Relaxed);
        if at >= ENTRIES || (at + 1) % ENTRIES == first.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: `at` is below ENTRIES, so the entry lies in the page; it begins at a multiple of 8.
        // The monitor reads it only after `last` has moved.
        unsafe { self.entries().add(at as usize).write_volatile(*entry) };
        last.store((at + 1) % ENTRIES, Ordering::Release);
        true
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Memory,
    Ports,
}

struct Zone {
    start: u64,
    size: u64,
    space: Space,
    ring: Arc<Ring>,
}

impl Zone {
    fn contains(&self, address: u64, length: u64) -> bool {
        address >= self.start
            && address
                .checked_add(length)
                .is_some_and(|end| end <= self.start.saturating_add(self.size))
    }
}

impl IoDevice for Zone {
    fn write(&self, address: u64, data: &[u8]) -> Handled {
        if self.contains(address, data.len() as u64) {
            self.ring.push(address, data, self.space)
        } else {
            Handled::No
        }
    }
}

/// A zone, and the same as its bus knows it.
type Registered = (Arc<Zone>, Arc<dyn IoDevice>);

/// The zones of a VM.
#[derive(Default)]
pub struct Zones {
    ring: Arc<Ring>,
    zones: Mutex<Vec<Registered>>,
}

#[expect(unsafe_code, reason = "the flag is in a C union")]
fn space(zone: &kvm_coalesced_mmio_zone) -> Result<Space, Errno> {
    // SAFETY: both variants of the union are the same integer.
    match unsafe { zone.__bindgen_anon_1.pio } {
        0 => Ok(Space::Memory),
        1 => Ok(Space::Ports),
        _ => Err(Errno::EINVAL),
    }
}

impl Zones {
    /// The ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// `KVM_REGISTER_COALESCED_MMIO`.
    pub fn register(
        &self,
        zone: &kvm_coalesced_mmio_zone,
        ports: &IoBus,
        memory: &IoBus,
    ) -> Result<(), Errno> {
        let space = space(zone)?;
        let (start, size) = (zone.addr, u64::from(zone.size));
        let zone = Arc::new(Zone {
            start,
            size,
            space,
            ring: Arc::clone(&self.ring),
        });
        let device: Arc<dyn IoDevice> = zone.clone();
        let bus = if space == Space::Ports { ports } else { memory };
        bus.add(start, size, Counted::Yes, Arc::clone(&device))?;
        self.zones
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((zone, device));
        Ok(())
    }

    /// `KVM_UNREGISTER_COALESCED_MMIO`: every zone that contains this one.
    pub fn unregister(
        &self,
        zone: &kvm_coalesced_mmio_zone,
        ports: &IoBus,
        memory: &IoBus,
    ) -> Result<(), Errno> {
        let space = space(zone)?;
        let bus = if space == Space::Ports { ports } else { memory };
        let size = u64::from(zone.size);
        self.zones
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(other, device)| {
                let gone = other.space == space && other.contains(zone.addr, size);
                if gone {
                    bus.remove(device);
                }
                !gone
            });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C, align(4096))]
    struct Memory([u8; PAGE]);

    struct Bench {
        zones: Zones,
        ports: IoBus,
        memory: IoBus,
        page: NonNull<u8>,
    }

    #[expect(unsafe_code, reason = "the ring's page")]
    fn bench() -> Bench {
        let page = NonNull::from(Box::leak(Box::new(Memory([0; PAGE])))).cast();
        let bench = Bench {
            zones: Zones::default(),
            ports: IoBus::default(),
            memory: IoBus::default(),
            page,
        };
        // SAFETY: leaked, so it lives for ever.
        unsafe { bench.zones.ring().set_page(page) };
        bench
    }

    fn zone(addr: u64, size: u32, pio: u32) -> kvm_coalesced_mmio_zone {
        kvm_coalesced_mmio_zone {
            addr,
            size,
            __bindgen_anon_1: kvm_bindings::kvm_coalesced_mmio_zone__bindgen_ty_1 { pio },
        }
    }

    #[test]
    fn writes_land_in_the_ring_until_it_is_full() {
        let b = bench();
        b.zones
            .register(&zone(0x1000, 0x100, 0), &b.ports, &b.memory)
            .unwrap();
        assert_eq!(ENTRIES, 170);
        for i in 0..ENTRIES - 1 {
            assert_eq!(b.memory.write(0x1000, &i.to_le_bytes()), Handled::Yes);
        }
        assert_eq!(b.memory.write(0x1000, &[0; 4]), Handled::No);
        let page = Page(b.page);
        page.index(offset_of!(kvm_coalesced_mmio_ring, first))
            .store(1, Ordering::Relaxed);
        assert_eq!(b.memory.write(0x10ff, &[1]), Handled::Yes);
        let last = page.index(offset_of!(kvm_coalesced_mmio_ring, last));
        assert_eq!(last.load(Ordering::Relaxed), 0, "around");
        last.store(7000, Ordering::Relaxed);
        assert_eq!(
            b.memory.write(0x1000, &[1]),
            Handled::No,
            "an index out of range"
        );
    }

    #[test]
    fn a_zone_takes_what_lies_within_it() {
        let b = bench();
        b.zones
            .register(&zone(0x70, 2, 1), &b.ports, &b.memory)
            .unwrap();
        assert_eq!(b.ports.write(0x71, &[0]), Handled::Yes);
        assert_eq!(b.ports.write(0x71, &[0, 0]), Handled::No);
        assert_eq!(b.memory.write(0x70, &[0]), Handled::No);
        b.zones
            .unregister(&zone(0x71, 1, 1), &b.ports, &b.memory)
            .unwrap();
        assert_eq!(b.ports.write(0x71, &[0]), Handled::No);
        let odd = zone(0, 1, 2);
        assert_eq!(
            b.zones.register(&odd, &b.ports, &b.memory),
            Err(Errno::EINVAL)
        );
    }
}
