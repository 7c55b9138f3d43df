//! What lies where in guest physical memory: RAM and devices as regions of a [`memory::space`],
//! and memory slots that follow it.
//!
//! ```text
//!   Ram, devices ──regions──> Space ──flat view──┬─> SlotListener ─> KVM_SET_USER_MEMORY_REGION
//!                                                └─> KVM_EXIT_MMIO: which device, which offset
//! ```

#![expect(
    unsafe_code,
    reason = "memory slots hand the monitor's memory to the guest"
)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use accel::Vm;
use addr::{Gpa, GpaRange};
use devices::bus::Device;
use kvm_bindings::{KVM_CAP_NR_MEMSLOTS, kvm_userspace_memory_region};
use memory::space::{
    Difference, Listener, ListenerError, Mmio, RegionKind, SlotAssigner, SlotCall, Space,
    SpaceError,
};
use thiserror::Error;

use crate::{error::BuildError, ram::Ram};

/// A slot that the accelerator refused.
#[derive(Debug, Error)]
#[error("KVM_SET_USER_MEMORY_REGION of slot {slot} for {len:#x} bytes at {gpa}: {cause}")]
struct SlotRefused {
    slot: u32,
    gpa: Gpa,
    len: u64,
    cause: accel::Errno,
}

/// A space with the blocks of RAM in it.
pub(crate) fn with_ram(ram: &Ram) -> Result<Arc<Space>, BuildError> {
    let space = Arc::new(Space::new());
    let mut change = space.transaction();
    for (gpa, block) in ram.blocks() {
        let kind = RegionKind::ram(block).map_err(|error| BuildError::Log(error.to_string()))?;
        let region = change.region("ram", block.size(), kind)?;
        change.place(space.root(), region, gpa.raw(), 0)?;
    }
    change.commit()?;
    Ok(space)
}

/// Puts a device's registers at `range`, above whatever else is there.
pub(crate) fn add_device(
    space: &Space,
    name: &str,
    range: GpaRange,
    device: Arc<dyn Device>,
) -> Result<(), SpaceError> {
    let mut change = space.transaction();
    let kind = RegionKind::Mmio(Arc::new(Registers(device)));
    let region = change.region(name, range.len(), kind)?;
    change.place(space.root(), region, range.start().raw(), 1)?;
    change.commit()?;
    Ok(())
}

/// Makes memory slots of `vm` follow the space, now and from now on.
pub(crate) fn follow(space: &Space, vm: &Arc<dyn Vm>) -> Result<KnownSlots, SpaceError> {
    let limit = vm.check_extension(KVM_CAP_NR_MEMSLOTS);
    let known = KnownSlots::default();
    space.listen(Box::new(SlotListener {
        vm: vm.clone(),
        assigner: SlotAssigner::new(u32::try_from(limit).unwrap_or(0)),
        known: known.clone(),
    }))?;
    Ok(known)
}

/// The memory slots that exist, for those who show them.
#[derive(Clone, Default)]
pub(crate) struct KnownSlots(Arc<Mutex<Vec<SlotCall>>>);

impl KnownSlots {
    /// The slots, by guest address.
    pub(crate) fn get(&self) -> Vec<SlotCall> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<SlotCall>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A load of the guest outside RAM. Addresses that nobody answers read as ones.
pub(crate) fn read(space: &Space, gpa: Gpa, data: &mut [u8]) {
    if space.read(gpa, data).is_err() {
        data.fill(0xff);
    }
}

/// A store of the guest outside RAM. Writes that nobody takes are lost.
pub(crate) fn write(space: &Space, gpa: Gpa, data: &[u8]) {
    if let Err(error) = space.write(gpa, data) {
        tracing::trace!(%error, "a store is lost");
    }
}

/// A device of the buses as a region.
struct Registers(Arc<dyn Device>);

impl Mmio for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

struct SlotListener {
    vm: Arc<dyn Vm>,
    assigner: SlotAssigner,
    known: KnownSlots,
}

impl SlotListener {
    fn make(&self, call: SlotCall) -> Result<(), SlotRefused> {
        let region = kvm_userspace_memory_region {
            slot: call.slot,
            flags: call.flags.bits(),
            guest_phys_addr: call.gpa.raw(),
            memory_size: call.size,
            userspace_addr: call.hva.raw(),
        };
        // SAFETY: the mapping is used by Rust code only through volatile accesses (vm-memory's and
        // `memory::access`), and the machine drops its vCPUs before its RAM.
        let made = unsafe { self.vm.set_user_memory_region(&region) };
        made.map_err(|cause| SlotRefused {
            slot: call.slot,
            gpa: call.gpa,
            len: call.size,
            cause,
        })
    }
}

impl Listener for SlotListener {
    fn changed(&mut self, difference: &Difference) -> Result<(), ListenerError> {
        for call in self.assigner.follow(difference)? {
            self.make(call)?;
        }
        *self.known.lock() = self.assigner.slots().copied().collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its offset.
    struct Ruler;

    impl Device for Ruler {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn ram_devices_and_holes_answer_as_on_a_bus() {
        let ram = Ram::new(8 << 20).unwrap();
        let space = with_ram(&ram).unwrap();
        let at = |start| GpaRange::new(Gpa::new(start), 0x1000).unwrap();
        add_device(&space, "over ram", at(0x10_0000), Arc::new(Ruler)).unwrap();
        add_device(&space, "outside", at(0xd000_0000), Arc::new(Ruler)).unwrap();
        let byte = |gpa| {
            let mut data = [0x55];
            read(&space, Gpa::new(gpa), &mut data);
            data[0]
        };
        assert_eq!(byte(0x10_0007), 7, "the device lies above RAM");
        assert_eq!(byte(0xd000_0003), 3);
        assert_eq!(byte(0xd000_1000), 0xff, "a hole reads as ones");
        write(&space, Gpa::new(0x20_0000), &[0x42]);
        assert_eq!(byte(0x20_0000), 0x42, "RAM keeps what is written");
    }
}
