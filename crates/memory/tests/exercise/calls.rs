//! Random calls on memory slots and dirty logs: mostly sensible, sometimes absurd.

use addr::{Gpa, Hva};
use arbitrary::{Result, Unstructured};
use memory::slot::{ManualProtect, Region};

const PAGE: u64 = 4096;
/// The slots that sensible calls use.
pub(crate) const SLOTS: std::ops::RangeInclusive<u32> = 1..=6;
/// The first frame that they use: below lie the code and data of a guest that touches pages.
pub(crate) const FIRST_FRAME: u64 = 16;
/// How many frames they use.
pub(crate) const FRAMES: u64 = 512;
/// Bytes of host memory that they use.
pub(crate) const ARENA: u64 = 1 << 20;

/// An address that slots take but where nothing is mapped: the guest never touches it.
pub(crate) const UNMAPPED: Hva = Hva::new(0x7fff_ffff_e000);

/// One call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// `KVM_SET_USER_MEMORY_REGION`.
    SetRegion(Region),
    /// `KVM_GET_DIRTY_LOG`.
    GetLog { slot: u32 },
    /// `KVM_CLEAR_DIRTY_LOG`, with this word repeated as bitmap.
    ClearLog {
        slot: u32,
        first_page: u64,
        num_pages: u32,
        word: u64,
    },
    /// The guest writes to a frame, where a writable slot is.
    Touch { frame: u64 },
}

/// How the log is harvested, and what is then called.
pub(crate) fn manual_protect(u: &mut Unstructured<'_>) -> Result<ManualProtect> {
    u.choose(&[
        ManualProtect::Off,
        ManualProtect::Enabled,
        ManualProtect::InitiallySet,
    ])
    .copied()
}

/// The next call; an error where the bytes are used up.
pub(crate) fn next(u: &mut Unstructured<'_>, arena: Hva) -> Result<Call> {
    if u.is_empty() {
        return Err(arbitrary::Error::NotEnoughData);
    }
    Ok(match u.int_in_range(0..=9)? {
        0..=3 => Call::SetRegion(region(u, arena)?),
        4 => Call::GetLog { slot: slot(u)? },
        5 => clear(u)?,
        _ => Call::Touch { frame: frame(u)? },
    })
}

/// One in `n`.
fn rarely(u: &mut Unstructured<'_>, n: u8) -> Result<bool> {
    u.ratio(1, n)
}

fn slot(u: &mut Unstructured<'_>) -> Result<u32> {
    if rarely(u, 20)? {
        let odd = [
            0x1_0001,
            0x2_0001,
            32763,
            32764,
            32766,
            32767,
            32768,
            65535,
            0xffff_0001,
        ];
        return u.choose(&odd).copied();
    }
    u.int_in_range(SLOTS)
}

fn frame(u: &mut Unstructured<'_>) -> Result<u64> {
    u.int_in_range(FIRST_FRAME..=FIRST_FRAME + FRAMES - 1)
}

fn region(u: &mut Unstructured<'_>, arena: Hva) -> Result<Region> {
    Ok(Region {
        slot: slot(u)?,
        flags: flags(u)?,
        gpa: gpa(u)?,
        size: size(u)?,
        hva: hva(u, arena)?,
    })
}

fn flags(u: &mut Unstructured<'_>) -> Result<u32> {
    if rarely(u, 30)? {
        return u.choose(&[4, 5, 8, 0x8000_0000, u32::MAX]).copied();
    }
    // Read-only slots are rarer: nothing in them gets dirty.
    Ok(u.int_in_range(0..=1)? | u32::from(rarely(u, 6)?) << 1)
}

fn gpa(u: &mut Unstructured<'_>) -> Result<Gpa> {
    if rarely(u, 30)? {
        let odd = [
            1,
            0x800,
            1 << 40,
            (1 << 52) - PAGE,
            1 << 52,
            u64::MAX - PAGE + 1,
            u64::MAX,
        ];
        return u.choose(&odd).copied().map(Gpa::new);
    }
    // Multiples of eight pages, so that moves and re-creations meet the same place often.
    Ok(Gpa::new((frame(u)? & !7) * PAGE))
}

fn size(u: &mut Unstructured<'_>) -> Result<u64> {
    if rarely(u, 30)? {
        let largest = ((1 << 31) - 1) * PAGE;
        let odd = [
            1,
            PAGE + 1,
            largest + PAGE,
            1 << 62,
            u64::MAX - PAGE + 1,
            u64::MAX,
        ];
        return u.choose(&odd).copied();
    }
    if rarely(u, 5)? {
        return Ok(0);
    }
    Ok(u.choose(&[1, 2, 8, 63, 64, 65, 130]).copied()? * PAGE)
}

fn hva(u: &mut Unstructured<'_>, arena: Hva) -> Result<Hva> {
    if rarely(u, 30)? {
        let odd = [
            1,
            0xfff,
            UNMAPPED.raw(),
            0x7fff_ffff_f000,
            0x8000_0000_0000,
            u64::MAX - 0xfff,
        ];
        return u.choose(&odd).copied().map(Hva::new);
    }
    // Few places: a slot that exists is often named with the address that it has.
    Ok(Hva::new(arena.raw() + u.int_in_range(0..=1)? * 64 * PAGE))
}

fn clear(u: &mut Unstructured<'_>) -> Result<Call> {
    Ok(Call::ClearLog {
        slot: slot(u)?,
        first_page: u
            .choose(&[0, 0, 0, 64, 128, 1, 63, 192, u64::MAX - 63])
            .copied()?,
        num_pages: u
            .choose(&[1, 2, 8, 63, 64, 65, 128, 130, 0, u32::MAX])
            .copied()?,
        word: u
            .choose(&[u64::MAX, 1, 0, 0xaaaa_aaaa_aaaa_aaaa])
            .copied()?,
    })
}
