//! Reads and writes at guest physical addresses, by a device or the monitor itself.

use addr::{Address, Gpa};

use super::Space;
use super::flat::{FlatRange, FlatView, Memory};
use super::tree::{Mmio, Protection, RamPiece};
use crate::access::{self, HostFault};

/// Why a transfer stopped. Bytes before the address have been transferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Nothing is there.
    #[error("nothing is at guest physical {0}")]
    Hole(Gpa),
    /// The address wraps.
    #[error("{len:#x} bytes at guest physical {gpa} wrap")]
    Wraps {
        /// The first byte.
        gpa: Gpa,
        /// Bytes.
        len: u64,
    },
    /// The host has no memory behind it.
    #[error("guest physical {gpa} has no memory behind it")]
    Host {
        /// The first byte of the range that failed.
        gpa: Gpa,
        /// What the host said.
        source: HostFault,
    },
}

impl Space {
    /// Reads what the guest would read.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), TransferError> {
        let view = self.view();
        pieces(&view, gpa, into.len(), |range, offset, part| {
            range.read(offset, &mut into[part])
        })
    }

    /// Writes as the guest would: what is written to ROM is lost, or the ROM's device gets it.
    pub fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), TransferError> {
        let view = self.view();
        pieces(&view, gpa, from.len(), |range, offset, part| {
            range.write(offset, &from[part])
        })
    }
}

type Part = std::ops::Range<usize>;

/// Calls `f` with each range that the transfer meets, the offset in it and the part of the buffer.
fn pieces(
    view: &FlatView,
    gpa: Gpa,
    len: usize,
    mut f: impl FnMut(&FlatRange, u64, Part) -> Result<(), HostFault>,
) -> Result<(), TransferError> {
    gpa.checked_add(len as u64).ok_or(TransferError::Wraps {
        gpa,
        len: len as u64,
    })?;
    let mut done = 0;
    while done < len {
        let at = gpa.wrapping_add(done as u64);
        let range = view.find(at).ok_or(TransferError::Hole(at))?;
        let offset = range.range.offset_of(at).ok_or(TransferError::Hole(at))?;
        let rest = range.range.len() - offset;
        let part = done..done + (len - done).min(usize::try_from(rest).unwrap_or(usize::MAX));
        f(range, offset, part.clone()).map_err(|source| TransferError::Host { gpa: at, source })?;
        done = part.end;
    }
    Ok(())
}

impl FlatRange {
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), HostFault> {
        match (&self.memory, self.hva()) {
            (Memory::Mmio(device), _) => {
                read_device(&**device, self.offset + offset, into);
                Ok(())
            }
            (Memory::Ram { .. }, hva) => {
                hva.map_or(Ok(()), |hva| access::read(hva.wrapping_add(offset), into))
            }
        }
    }

    pub(super) fn write(&self, offset: u64, from: &[u8]) -> Result<(), HostFault> {
        let in_region = self.offset + offset;
        match &self.memory {
            Memory::Mmio(device) => write_device(&**device, in_region, from),
            Memory::Ram {
                protection: Protection::ReadOnly,
                on_write,
                ..
            } => {
                if let Some(device) = on_write {
                    write_device(&**device, in_region, from);
                }
            }
            Memory::Ram { piece, .. } => {
                let hva = piece.ram.hva().wrapping_add(piece.offset + in_region);
                let written = access::write(hva, from);
                // Behind the write, also where it ended half-way: a harvest in between finds the
                // page again.
                piece.mark(in_region, from.len() as u64);
                written?;
            }
        }
        Ok(())
    }
}

impl RamPiece {
    /// Marks the pages of bytes that the monitor wrote.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        if len != 0 {
            let first = (self.offset + offset) / 4096;
            let last = (self.offset + offset + len - 1) / 4096;
            for page in first..=last {
                self.dirty.mark(page);
            }
        }
    }
}

/// The largest naturally aligned access that begins at `offset` and has at most `left` bytes.
fn access_size(offset: u64, left: usize) -> usize {
    let aligned = 1 << offset.trailing_zeros().min(3);
    let fits = 1 << left.ilog2().min(3);
    aligned.min(fits)
}

fn read_device(device: &dyn Mmio, mut offset: u64, mut into: &mut [u8]) {
    while !into.is_empty() {
        let (now, rest) = into.split_at_mut(access_size(offset, into.len()));
        device.read(offset, now);
        offset += now.len() as u64;
        into = rest;
    }
}

fn write_device(device: &dyn Mmio, mut offset: u64, mut from: &[u8]) {
    while !from.is_empty() {
        let (now, rest) = from.split_at(access_size(offset, from.len()));
        device.write(offset, now);
        offset += now.len() as u64;
        from = rest;
    }
}
