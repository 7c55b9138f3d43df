//! The dirty ring of one vCPU (`api.rst`, `KVM_CAP_DIRTY_LOG_RING`).
//!
//! An array of [`DirtyGfn`] in memory that the monitor maps. The vCPU pushes; the monitor collects
//! entries and sets their `RESET` flag; `KVM_RESET_DIRTY_RINGS` gives the collected entries back and
//! protects their pages anew.
//!
//! | flags of an entry | who owns it | next                                                        |
//! |-------------------|-------------|-------------------------------------------------------------|
//! | 0                 | the vCPU    | filled, then `DIRTY`                                        |
//! | `DIRTY`           | the monitor | collected, then `RESET` (with or without `DIRTY`)           |
//! | `RESET`           | the vCPU    | reset, then 0                                               |
//!
//! The array is the monitor's to write, so nothing in it is trusted: the indices are kept outside.

use addr::{Address, Hva};

use crate::access::{self, HostFault};

/// `struct kvm_dirty_gfn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyGfn {
    /// Address space in the high half, slot in the low.
    pub slot: u32,
    /// The page within the slot.
    pub offset: u64,
}

/// Size of an entry in memory.
const ENTRY: u64 = 16;
const FLAG_DIRTY: u32 = 1;
const FLAG_RESET: u32 = 2;
/// Entries that stay free when the ring reports itself full, so that what a vCPU does on its way out
/// still fits (the kernel's `KVM_DIRTY_RING_RSVD_ENTRIES`).
pub const RESERVED_ENTRIES: u32 = 64;
/// The kernel's `KVM_DIRTY_RING_MAX_ENTRIES`.
const MAX_ENTRIES: u64 = 65536;
const PAGE: u64 = 4096;

/// Why a ring of some size is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two, or less than a page.
    #[error("a dirty ring of {0} bytes is no power of two of at least a page")]
    Size(u64),
    /// More than 65,536 entries.
    #[error("a dirty ring of {0} bytes is too large")]
    TooLarge(u64),
}

impl RingError {
    /// What the kernel answers.
    pub fn errno(self) -> i32 {
        match self {
            Self::Size(_) => libc::EINVAL,
            Self::TooLarge(_) => libc::E2BIG,
        }
    }
}

/// Whether there is room for another push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Pushed {
    /// Yes.
    Room,
    /// The soft limit is reached: leave with `KVM_EXIT_DIRTY_RING_FULL`.
    SoftFull,
}

/// The vCPU's side of its ring.
#[derive(Debug)]
pub struct DirtyRing {
    entries: Hva,
    size: u32,
    dirty_index: u32,
    reset_index: u32,
}

impl DirtyRing {
    /// Checks the size in bytes that `KVM_ENABLE_CAP` asks for; returns the number of entries.
    pub fn entries_for(bytes: u64) -> Result<u32, RingError> {
        let least = PAGE.max(u64::from(RESERVED_ENTRIES) * ENTRY);
        if !bytes.is_power_of_two() || bytes < least {
            return Err(RingError::Size(bytes));
        }
        if bytes > MAX_ENTRIES * ENTRY {
            return Err(RingError::TooLarge(bytes));
        }
        Ok((bytes / ENTRY) as u32)
    }

    /// A ring of `bytes` bytes of zeroed memory at `entries`, which outlives it.
    pub fn new(entries: Hva, bytes: u64) -> Result<Self, RingError> {
        Ok(Self {
            entries,
            size: Self::entries_for(bytes)?,
            dirty_index: 0,
            reset_index: 0,
        })
    }

    /// Entries in use: pushed and not yet reset.
    pub fn used(&self) -> u32 {
        self.dirty_index.wrapping_sub(self.reset_index)
    }

    /// Whether the vCPU must not run until entries are reset.
    pub fn is_soft_full(&self) -> bool {
        self.used() >= self.size - RESERVED_ENTRIES
    }

    /// Appends a page.
    ///
    /// With no entry left (the vCPU ran on although [`DirtyRing::is_soft_full`]) the oldest would be
    /// overwritten; instead nothing is written and the answer stays [`Pushed::SoftFull`].
    pub fn push(&mut self, page: DirtyGfn) -> Result<Pushed, HostFault> {
        if self.used() >= self.size {
            return Ok(Pushed::SoftFull);
        }
        let entry = self.entry(self.dirty_index);
        access::store_word(entry.wrapping_add(4), page.slot)?;
        access::store_word(entry.wrapping_add(8), page.offset)?;
        // x86 keeps stores in order: who sees the flag sees the page.
        access::store_word(entry, FLAG_DIRTY)?;
        self.dirty_index = self.dirty_index.wrapping_add(1);
        Ok(if self.is_soft_full() {
            Pushed::SoftFull
        } else {
            Pushed::Room
        })
    }

    /// Takes back the entries that the monitor collected, from the oldest on; `reset` gets each page,
    /// to protect it anew. Returns how many.
    pub fn reset(&mut self, mut reset: impl FnMut(DirtyGfn)) -> Result<u32, HostFault> {
        let mut count = 0;
        while self.used() != 0 {
            let entry = self.entry(self.reset_index);
            if access::load_word::<u32>(entry)? & FLAG_RESET == 0 {
                break;
            }
            reset(DirtyGfn {
                slot: access::load_word(entry.wrapping_add(4))?,
                offset: access::load_word(entry.wrapping_add(8))?,
            });
            access::store_word(entry, 0_u32)?;
            self.reset_index = self.reset_index.wrapping_add(1);
            count += 1;
        }
        Ok(count)
    }

    fn entry(&self, index: u32) -> Hva {
        self.entries
            .wrapping_add(u64::from(index & (self.size - 1)) * ENTRY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 4096;

    fn ring(memory: &mut [u64; 512]) -> DirtyRing {
        DirtyRing::new(Hva::new(memory.as_mut_ptr() as u64), BYTES).unwrap()
    }

    fn page(offset: u64) -> DirtyGfn {
        DirtyGfn {
            slot: 0x1_0002,
            offset,
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(DirtyRing::entries_for(0), Err(RingError::Size(0)));
        assert_eq!(DirtyRing::entries_for(2048), Err(RingError::Size(2048)));
        assert_eq!(DirtyRing::entries_for(12288), Err(RingError::Size(12288)));
        assert_eq!(DirtyRing::entries_for(4096), Ok(256));
        assert_eq!(DirtyRing::entries_for(1 << 20), Ok(65536));
        assert_eq!(
            DirtyRing::entries_for(1 << 21).unwrap_err().errno(),
            libc::E2BIG
        );
    }

    #[test]
    fn the_monitor_reads_what_was_pushed() {
        let mut memory = [0; 512];
        let mut ring = ring(&mut memory);
        assert_eq!(ring.push(page(7)), Ok(Pushed::Room));
        let entry = (
            access::load_word(ring.entry(0)),
            access::load_word(ring.entry(0).wrapping_add(8)),
        );
        assert_eq!(entry, (Ok(0x1_0002_0000_0001_u64), Ok(7_u64)));
    }

    #[test]
    fn fills_and_resets_in_order() {
        let mut memory = [0; 512];
        let mut ring = ring(&mut memory);
        for i in 0..191 {
            assert_eq!(ring.push(page(i)), Ok(Pushed::Room));
        }
        for i in 191..256 {
            assert_eq!(ring.push(page(i)), Ok(Pushed::SoftFull));
        }
        assert_eq!(
            ring.push(page(256)),
            Ok(Pushed::SoftFull),
            "dropped, not overwritten"
        );
        assert_eq!(ring.used(), 256);
        for i in [0, 1, 3] {
            access::store_word(ring.entry(i), FLAG_RESET).unwrap();
        }
        let mut seen = Vec::new();
        assert_eq!(
            ring.reset(|p| seen.push(p)),
            Ok(2),
            "stops at the first that is not collected"
        );
        assert_eq!(seen, [page(0), page(1)]);
        assert_eq!(ring.used(), 254);
    }
}
