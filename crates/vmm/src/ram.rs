//! Guest RAM: one block below the PCI window, one above 4 GiB where it does not fit.

use addr::Gpa;
use memory::ram::{GuestRam, RamConfig, guest_memory};
use vm_memory::GuestMemoryMmap;

use crate::{error::BuildError, layout};

const MIB: u64 = 1 << 20;
/// Less than this holds no kernel worth the name.
const LEAST: u64 = 8 * MIB;

/// The blocks, and the view of them that loaders and virtqueues use.
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

    /// The blocks, and where the guest sees them.
    pub(crate) fn blocks(&self) -> &[(Gpa, GuestRam)] {
        &self.blocks
    }

    /// Bytes below the PCI window.
    pub(crate) fn low_end(&self) -> Gpa {
        Gpa::new(self.blocks[0].1.size())
    }

    /// Bytes above 4 GiB.
    pub(crate) fn high_size(&self) -> u64 {
        self.blocks.get(1).map_or(0, |(_, ram)| ram.size())
    }
}
