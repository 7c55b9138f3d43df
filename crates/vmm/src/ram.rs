//! Guest RAM: one block below the PCI window, one above 4 GiB where it does not fit; each a memory
//! slot.

#![expect(
    unsafe_code,
    reason = "memory slots hand the monitor's memory to the guest"
)]

use accel::Vm;
use addr::Gpa;
use kvm_bindings::kvm_userspace_memory_region;
use memory::ram::{GuestRam, RamConfig, guest_memory};
use vm_memory::GuestMemoryMmap;

use crate::{error::BuildError, layout};

const MIB: u64 = 1 << 20;
/// Less than this holds no kernel worth the name.
const LEAST: u64 = 8 * MIB;

/// The blocks, and the view of them that loaders and devices use.
pub(crate) struct Ram {
    blocks: Vec<(Gpa, GuestRam)>,
    pub(crate) view: GuestMemoryMmap,
}

impl Ram {
    /// Allocates `size` bytes.
    pub(crate) fn new(size: u64) -> Result<Self, BuildError> {
        if size < LEAST || !size.is_multiple_of(MIB) {
            return Err(BuildError::Memory {
                asked: size,
                least: LEAST,
            });
        }
        let low = size.min(layout::LOW_RAM_END.raw());
        let mut blocks = vec![(Gpa::new(0), GuestRam::new(&RamConfig::private(low))?)];
        if size > low {
            let high = GuestRam::new(&RamConfig::private(size - low))?;
            blocks.push((layout::HIGH_RAM, high));
        }
        let borrowed: Vec<_> = blocks.iter().map(|(gpa, ram)| (*gpa, ram)).collect();
        let view = guest_memory(&borrowed)?;
        Ok(Self { blocks, view })
    }

    /// Bytes below the PCI window.
    pub(crate) fn low_end(&self) -> Gpa {
        Gpa::new(self.blocks[0].1.size())
    }

    /// Bytes above 4 GiB.
    pub(crate) fn high_size(&self) -> u64 {
        self.blocks.get(1).map_or(0, |(_, ram)| ram.size())
    }

    /// Registers each block as a memory slot.
    pub(crate) fn register(&self, vm: &dyn Vm) -> Result<(), BuildError> {
        for (slot, (gpa, ram)) in self.blocks.iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: gpa.raw(),
                memory_size: ram.size(),
                userspace_addr: ram.hva().raw(),
            };
            // SAFETY: the mapping is used by Rust code only through vm-memory's volatile accesses,
            // and the machine drops its VM before the blocks.
            let registered = unsafe { vm.set_user_memory_region(&region) };
            registered.map_err(|cause| BuildError::Slot {
                gpa: *gpa,
                len: ram.size(),
                cause,
            })?;
        }
        Ok(())
    }
}
