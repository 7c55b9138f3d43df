//! Configuration space of one function (PCI Local Bus 3.0, chapter 6).
//!
//! The space is 256 bytes and a mask of the bits that software can write. That gives BARs their
//! behaviour for free: the address bits below the BAR's size are read-only zeroes, so that "write
//! ones, read back" tells the size. Beyond 256 bytes (ECAM) there are no capabilities: zeroes.

use addr::{Gpa, GpaRange};

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const FIRST_BAR: usize = 0x10;
/// Command register: memory decoding.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: what software may write (I/O, memory, bus master, `INTx` disable).
const COMMAND_WRITABLE: u16 = 0b0000_0100_0000_0111;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What the function says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, as the 24-bit register holds them.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// A memory BAR and where it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// 0 to 5.
    pub index: usize,
    /// The addresses.
    pub range: GpaRange,
}

/// Configuration space.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Sizes of the 32-bit memory BARs; 0 where there is none.
    bars: [u32; 6],
    next_capability: usize,
    /// The byte that points to the next capability added.
    last_link: usize,
}

impl ConfigSpace {
    /// A space with this identity, no BARs and no capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [0; 6],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes BAR `index` a 32-bit memory BAR of `size` bytes, a power of two of at least 16.
    pub fn add_bar(&mut self, index: usize, size: u32) {
        assert!(size.is_power_of_two() && size >= 16, "a BAR's size");
        self.bars[index] = size;
        let mask = !(size - 1);
        self.allow(FIRST_BAR + 4 * index, &mask.to_le_bytes());
    }

    /// Adds a capability: `id`, a link, then `body`, of whose bits those in `writable` (as long as
    /// `body`) may be written. Gives its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        assert!(at + 2 + body.len() <= SIZE, "capabilities fill the space");
        self.put(self.last_link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.get_u16(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at as u16
    }

    /// Reads at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self
                .bytes
                .get(usize::from(offset) + i)
                .copied()
                .unwrap_or(0);
        }
    }

    /// Writes at `offset` what may be written there.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let targets = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in targets.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// The 16-bit register at `offset`.
    pub fn get_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    pub fn get_u32(&self, offset: usize) -> u32 {
        u32::from(self.get_u16(offset)) | u32::from(self.get_u16(offset + 2)) << 16
    }

    /// The memory BARs as they are decoded now.
    pub fn decoded(&self) -> Vec<Bar> {
        if self.get_u16(COMMAND) & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        self.bar_sizes()
            .into_iter()
            .filter_map(|(index, size)| {
                let start = Gpa::new(u64::from(self.get_u32(FIRST_BAR + 4 * index)));
                let range = GpaRange::new(start, size)?;
                Some(Bar { index, range })
            })
            .collect()
    }

    /// Index and size of each memory BAR.
    pub fn bar_sizes(&self) -> Vec<(usize, u64)> {
        let sizes = self.bars.iter().enumerate().filter(|(_, size)| **size != 0);
        sizes
            .map(|(index, size)| (index, u64::from(*size)))
            .collect()
    }

    /// Writes the address of BAR `index`, as firmware would.
    pub fn place(&mut self, index: usize, at: Gpa) {
        let low = at.raw() as u32;
        self.write((FIRST_BAR + 4 * index) as u16, &low.to_le_bytes());
        let command = self.get_u16(COMMAND) | COMMAND_MEMORY;
        self.write(COMMAND as u16, &command.to_le_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        })
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        space.add_bar(0, 0x8000);
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(space.get_u32(0x10), 0xffff_8000);
        assert_eq!(space.decoded(), [], "memory decoding is off");
        space.place(0, Gpa::new(0xc000_0000));
        let decoded = space.decoded();
        assert_eq!(decoded[0].range.start(), Gpa::new(0xc000_0000));
        assert_eq!(decoded[0].range.len(), 0x8000);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut space = space();
        assert_eq!(space.get_u16(STATUS) & STATUS_CAPABILITIES, 0);
        let first = space.add_capability(0x09, &[1, 2, 3], &[0, 0, 0]);
        let second = space.add_capability(0x11, &[4, 5], &[0xff, 0]);
        assert_eq!(space.bytes[CAPABILITIES], first as u8);
        assert_eq!(space.bytes[usize::from(first) + 1], second as u8);
        assert_eq!(space.bytes[usize::from(second) + 1], 0);
        assert_eq!(second % 4, 0);
        assert_ne!(space.get_u16(STATUS) & STATUS_CAPABILITIES, 0);
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0; 64]);
        assert_eq!(space.get_u32(0), 0x1042_1af4);
        assert_eq!(space.get_u32(8), 0x0180_0001);
    }

    #[test]
    fn accesses_over_the_end_are_cut() {
        let mut space = space();
        space.write(254, &[1; 8]);
        let mut data = [7; 8];
        space.read(254, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
