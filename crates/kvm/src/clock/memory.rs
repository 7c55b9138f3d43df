//! The guest's memory, as clocks write it.

use addr::Gpa;

/// No memory of the guest at this address, or none that can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no guest memory at {0:#x}")]
pub struct NoMemory(pub Gpa);

/// Guest memory by guest physical address. Writes are logged as dirty.
pub trait GuestMemory {
    /// Reads; all or nothing.
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), NoMemory>;
    /// Writes; all or nothing. What was written by an earlier call is visible before this one.
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), NoMemory>;
}

/// Reads a little-endian word.
pub(super) fn read_u32(memory: &dyn GuestMemory, gpa: Gpa) -> Result<u32, NoMemory> {
    let mut bytes = [0; 4];
    memory.read(gpa, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Reads a little-endian doubleword.
pub(super) fn read_u64(memory: &dyn GuestMemory, gpa: Gpa) -> Result<u64, NoMemory> {
    let mut bytes = [0; 8];
    memory.read(gpa, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The address `offset` bytes further on.
pub(super) fn at(gpa: Gpa, offset: u64) -> Gpa {
    Gpa::new(gpa.raw().wrapping_add(offset))
}

/// Changes a structure that begins with, or has at `version`, a version: odd while it changes.
pub(super) fn versioned(
    memory: &dyn GuestMemory,
    version: Gpa,
    change: impl FnOnce() -> Result<(), NoMemory>,
) -> Result<(), NoMemory> {
    let odd = read_u32(memory, version)?.wrapping_add(1) | 1;
    memory.write(version, &odd.to_le_bytes())?;
    change()?;
    memory.write(version, &odd.wrapping_add(1).to_le_bytes())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::RefCell;

    /// 64 bytes at 0x1000, and the sequence of versions seen.
    #[derive(Default)]
    pub(in crate::clock) struct Page {
        pub bytes: RefCell<[u8; 32]>,
        pub versions: RefCell<Vec<u32>>,
    }

    pub(in crate::clock) const BASE: Gpa = Gpa::new(0x1000);

    impl Page {
        fn range(gpa: Gpa, len: usize) -> Result<std::ops::Range<usize>, NoMemory> {
            let start = gpa.raw().checked_sub(BASE.raw()).ok_or(NoMemory(gpa))? as usize;
            let end = start
                .checked_add(len)
                .filter(|end| *end <= 32)
                .ok_or(NoMemory(gpa))?;
            Ok(start..end)
        }
    }

    impl GuestMemory for Page {
        fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), NoMemory> {
            data.copy_from_slice(&self.bytes.borrow()[Self::range(gpa, data.len())?]);
            Ok(())
        }

        fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), NoMemory> {
            self.bytes.borrow_mut()[Self::range(gpa, data.len())?].copy_from_slice(data);
            self.versions.borrow_mut().push(read_u32(self, BASE)?);
            Ok(())
        }
    }
}
