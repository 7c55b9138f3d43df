//! Accesses of any length, made of the single instructions.

use addr::{Address, Hva};

use super::instruction::{copy_bytes, fill_bytes};
use super::{HostFault, fault, load_word, store_word};

/// Reads 1 to 8 bytes, little-endian. A length of 1, 2, 4 or 8 is one access.
///
/// `len` is clamped to eight; zero bytes are zero.
#[inline]
pub fn load(hva: Hva, len: usize) -> Result<u64, HostFault> {
    match len {
        1 => load_word::<u8>(hva).map(u64::from),
        2 => load_word::<u16>(hva).map(u64::from),
        4 => load_word::<u32>(hva).map(u64::from),
        8 => load_word::<u64>(hva),
        _ => {
            let mut bytes = [0; 8];
            read(hva, &mut bytes[..len.min(8)])?;
            Ok(u64::from_le_bytes(bytes))
        }
    }
}

/// Writes the low 1 to 8 bytes of `value`, little-endian. A length of 1, 2, 4 or 8 is one access.
///
/// `len` is clamped to eight.
#[inline]
pub fn store(hva: Hva, value: u64, len: usize) -> Result<(), HostFault> {
    match len {
        1 => store_word(hva, value as u8),
        2 => store_word(hva, value as u16),
        4 => store_word(hva, value as u32),
        8 => store_word(hva, value),
        _ => write(hva, &value.to_le_bytes()[..len.min(8)]),
    }
}

/// Reads `into.len()` bytes.
///
/// After an error the bytes before the fault's address have been read.
#[inline]
pub fn read(hva: Hva, into: &mut [u8]) -> Result<(), HostFault> {
    let len = into.len() as u64;
    // SAFETY: `into` is ours and holds `len` bytes; the other side is the guest's.
    unsafe { copy_bytes(into.as_mut_ptr() as u64, hva.raw(), len) }
        .map_err(|(left, signal)| fault(hva.wrapping_add(len - left), signal))
}

/// Writes all of `from`.
///
/// After an error the bytes before the fault's address have been written.
#[inline]
pub fn write(hva: Hva, from: &[u8]) -> Result<(), HostFault> {
    let len = from.len() as u64;
    // SAFETY: `from` holds `len` bytes; the other side is the guest's.
    unsafe { copy_bytes(hva.raw(), from.as_ptr() as u64, len) }
        .map_err(|(left, signal)| fault(hva.wrapping_add(len - left), signal))
}

/// Copies `len` bytes from one place of guest memory to another, from the lowest up.
///
/// Where the two overlap with `to` above `from`, bytes repeat, as `REP MOVSB` does. The fault's
/// address is the source's: which side faulted is not known.
#[inline]
pub fn copy(to: Hva, from: Hva, len: u64) -> Result<(), HostFault> {
    // SAFETY: both sides are the guest's.
    unsafe { copy_bytes(to.raw(), from.raw(), len) }
        .map_err(|(left, signal)| fault(from.wrapping_add(len - left), signal))
}

/// Sets `len` bytes to `value`.
#[inline]
pub fn fill(hva: Hva, value: u8, len: u64) -> Result<(), HostFault> {
    // SAFETY: the memory is the guest's.
    unsafe { fill_bytes(hva.raw(), value, len) }
        .map_err(|(left, signal)| fault(hva.wrapping_add(len - left), signal))
}

/// Reads words.
pub fn read_words(hva: Hva, into: &mut [u64]) -> Result<(), HostFault> {
    let len = size_of_val(into) as u64;
    // SAFETY: `into` is ours, holds `len` bytes, and any bytes are words; the other side is the
    // guest's.
    unsafe { copy_bytes(into.as_mut_ptr() as u64, hva.raw(), len) }
        .map_err(|(left, signal)| fault(hva.wrapping_add(len - left), signal))
}

/// Writes words.
pub fn write_words(hva: Hva, from: &[u64]) -> Result<(), HostFault> {
    let len = size_of_val(from) as u64;
    // SAFETY: `from` holds `len` bytes; the other side is the guest's.
    unsafe { copy_bytes(hva.raw(), from.as_ptr() as u64, len) }
        .map_err(|(left, signal)| fault(hva.wrapping_add(len - left), signal))
}
