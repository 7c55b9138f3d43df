//! `map()` and `unmap()`: a device works on guest memory in place (QEMU's
//! `cpu_physical_memory_map`).
//!
//! | the address lies in          | a mapping to read       | a mapping to write                     |
//! |------------------------------|-------------------------|----------------------------------------|
//! | RAM                          | the RAM itself          | the RAM itself, marked dirty on unmap  |
//! | ROM                          | the memory itself       | a bounce buffer, whose bytes go to the ROM's device or nowhere |
//! | a device                     | a bounce buffer, filled | a bounce buffer, written on unmap      |
//! | a hole                       | an error                | an error                               |
//!
//! A mapping never reaches beyond its range of the flat view; the caller maps the rest anew. Bounce
//! buffers are limited in number: a guest decides what is mapped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use addr::{Address, Gpa, GpaRange, Hva, HvaRange};

use super::Space;
use super::flat::{FlatRange, Memory};
use super::transfer::TransferError;
use super::tree::Protection;
use crate::access::{self, HostFault};

/// A bounce buffer is at most this long.
const BOUNCE_MAX: u64 = 4096;

/// What the device will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read what the guest wrote.
    Read,
    /// Write what the guest will read.
    Write,
}

/// Why there is no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Nothing there, or it can't be read into a bounce buffer.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// No bytes were asked for.
    #[error("a mapping of no bytes at guest physical {0}")]
    Empty(Gpa),
    /// Too many bounce buffers are out; some must be unmapped first.
    #[error("no bounce buffer left for guest physical {0}")]
    NoBounceBuffer(Gpa),
}

/// Guest memory, or a copy of what a device shows, for as long as this lives.
///
/// Dropping it without [`Mapped::unmap`] is an unmap with nothing written.
#[derive(Debug)]
pub struct Mapped {
    gpa: Gpa,
    access: Access,
    /// Holds the RAM's mapping, even where the region is gone by now.
    range: FlatRange,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Direct(HvaRange),
    Bounce { buffer: Box<[u8]>, _permit: Permit },
}

/// Bytes of bounce buffers; given back on drop.
#[derive(Debug)]
struct Permit {
    bounced: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.bounced.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Space {
    /// Maps up to `len` bytes; [`Mapped::len`] says how many it became.
    pub fn map(&self, gpa: Gpa, len: u64, access: Access) -> Result<Mapped, MapError> {
        if len == 0 {
            return Err(MapError::Empty(gpa));
        }
        let asked = GpaRange::new(gpa, len).ok_or(TransferError::Wraps { gpa, len })?;
        let view = self.view();
        let range = view.find(gpa).ok_or(TransferError::Hole(gpa))?;
        let inside = range
            .range
            .intersection(asked)
            .ok_or(TransferError::Hole(gpa))?;
        let place = match direct(range, inside, access) {
            Some(place) => Place::Direct(place),
            None => self.bounce(gpa, inside.len().min(BOUNCE_MAX), access)?,
        };
        Ok(Mapped {
            gpa,
            access,
            range: range.clone(),
            place,
        })
    }

    fn bounce(&self, gpa: Gpa, len: u64, access: Access) -> Result<Place, MapError> {
        let taken = self.bounced.fetch_add(len, Ordering::Relaxed);
        let permit = Permit {
            bounced: self.bounced.clone(),
            bytes: len,
        };
        if taken + len > self.bounce_limit {
            return Err(MapError::NoBounceBuffer(gpa));
        }
        let mut buffer = vec![0; len as usize].into_boxed_slice();
        if access == Access::Read {
            self.read(gpa, &mut buffer)?;
        }
        Ok(Place::Bounce {
            buffer,
            _permit: permit,
        })
    }
}

/// Where the bytes can be used in place.
fn direct(range: &FlatRange, inside: GpaRange, access: Access) -> Option<HvaRange> {
    if access == Access::Write && range.protection() == Protection::ReadOnly {
        return None;
    }
    let skipped = inside.start().offset_from(range.range.start())?;
    HvaRange::new(range.hva()?.checked_add(skipped)?, inside.len())
}

impl Mapped {
    /// The first byte, as the guest names it.
    pub fn gpa(&self) -> Gpa {
        self.gpa
    }

    /// How many bytes are mapped: at least one.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        match &self.place {
            Place::Direct(place) => place.len(),
            Place::Bounce { buffer, .. } => buffer.len() as u64,
        }
    }

    /// Where the guest's own memory is mapped; `None` for a bounce buffer.
    pub fn hva(&self) -> Option<Hva> {
        match &self.place {
            Place::Direct(place) => Some(place.start()),
            Place::Bounce { .. } => None,
        }
    }

    /// Copies bytes out, from `offset` on; as many as are there. Returns how many.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<usize, HostFault> {
        let len = self.clip(offset, into.len());
        match &self.place {
            Place::Direct(place) => {
                access::read(place.start().wrapping_add(offset), &mut into[..len])?;
            }
            Place::Bounce { buffer, .. } if len > 0 => {
                into[..len].copy_from_slice(&buffer[offset as usize..][..len]);
            }
            Place::Bounce { .. } => {}
        }
        Ok(len)
    }

    /// Copies bytes in, from `offset` on; as many as fit. Returns how many: none where it was mapped
    /// to be read.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<usize, HostFault> {
        let len = match self.access {
            Access::Read => 0,
            Access::Write => self.clip(offset, from.len()),
        };
        match &mut self.place {
            Place::Direct(place) if len > 0 => {
                access::write(place.start().wrapping_add(offset), &from[..len])?;
            }
            Place::Bounce { buffer, .. } if len > 0 => {
                buffer[offset as usize..][..len].copy_from_slice(&from[..len]);
            }
            _ => {}
        }
        Ok(len)
    }

    /// Ends the mapping: the first `written` bytes have been written. RAM is marked dirty, a bounce
    /// buffer goes where it belongs.
    pub fn unmap(self, written: u64) -> Result<(), HostFault> {
        let written = written.min(self.len());
        if self.access == Access::Read || written == 0 {
            return Ok(());
        }
        let skipped = self.range.range.offset_of(self.gpa).unwrap_or(0);
        match (&self.place, &self.range.memory) {
            (Place::Direct(_), Memory::Ram { piece, .. }) => {
                piece.mark(self.range.offset + skipped, written);
                Ok(())
            }
            (Place::Direct(_), Memory::Mmio(_)) => Ok(()),
            (Place::Bounce { buffer, .. }, _) => {
                self.range.write(skipped, &buffer[..written as usize])
            }
        }
    }

    fn clip(&self, offset: u64, len: usize) -> usize {
        let rest = self.len().saturating_sub(offset);
        len.min(usize::try_from(rest).unwrap_or(usize::MAX))
    }
}
