//! Segment checks that translated code leaves to Rust (SDM 3A, 6.3 and 6.5).

use addr::Gva;
use x86::descriptor::attributes;

use crate::system::Abort;
use crate::translate::Use;
use crate::{CpuState, Exception, Segment};

/// A segment register by its number in the encoding.
pub(crate) fn segment(state: &CpuState, number: u8) -> &Segment {
    let s = &state.segments;
    match number {
        0 => &s.es,
        1 => &s.cs,
        2 => &s.ss,
        3 => &s.ds,
        4 => &s.fs,
        _ => &s.gs,
    }
}

/// What a bad address in this segment raises.
pub(crate) fn bad_address(number: u8) -> Abort {
    Abort::Exception(Exception {
        vector: if number == 2 {
            x86::vector::SS
        } else {
            x86::vector::GP
        },
        error_code: Some(0),
        payload: None,
    })
}

/// Whether bits 63 to 47 (56 with five levels) are equal.
pub(crate) fn is_canonical(address: u64, state: &CpuState) -> bool {
    let bits = if state.cr4 & x86::control::Cr4::LA57.bits() != 0 {
        57
    } else {
        48
    };
    let shift = 64 - bits;
    ((address << shift) as i64 >> shift) as u64 == address
}

/// The linear address of `size` bytes at `offset` in a segment outside of 64-bit mode.
pub(crate) fn checked(
    state: &CpuState,
    number: u8,
    offset: u32,
    size: u32,
    usage: Use,
) -> Result<Gva, Abort> {
    let segment = segment(state, number);
    let a = segment.attributes;
    let protected = state.cr0 & 1 != 0 && state.rflags & x86::rflags::VM == 0;
    let code = a & attributes::CODE != 0;
    let right = a & attributes::WRITABLE_READABLE != 0;
    let allowed = if code {
        right && !usage.writes()
    } else {
        right || !usage.writes()
    };
    let last = u64::from(offset) + u64::from(size) - 1;
    let down = !code && a & attributes::DOWN_CONFORMING != 0;
    let inside = if down && protected {
        let top = if a & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        u64::from(offset) > u64::from(segment.limit) && last <= top
    } else {
        last <= u64::from(segment.limit)
    };
    if protected && (segment.unusable || !allowed) || !inside {
        return Err(bad_address(number));
    }
    Ok(Gva::new(
        segment.base.wrapping_add(u64::from(offset)) & 0xffff_ffff,
    ))
}
