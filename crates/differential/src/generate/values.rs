//! Values at which arithmetic changes its mind.

use fastrand::Rng;

/// Integers around the borders of each size, small ones, random ones.
pub fn integer(rng: &mut Rng) -> u64 {
    const CORNERS: [u64; 18] = [
        0,
        1,
        2,
        0x7f,
        0x80,
        0xff,
        0x100,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        0xffff_ffff_8000_0000,
        0xffff_ffff_ffff_ffff,
    ];
    match rng.u8(..10) {
        0..4 => CORNERS[rng.usize(..CORNERS.len())],
        4 => rng.u64(..256),
        5 => 1 << rng.u8(..64),
        6 => u64::from(rng.u32(..)),
        7 => rng.u64(..) & rng.u64(..) & rng.u64(..),
        _ => rng.u64(..),
    }
}

/// A single-precision number, as its bits.
pub fn single(rng: &mut Rng) -> u32 {
    const CORNERS: [u32; 14] = [
        0x0000_0000, // 0
        0x8000_0000, // -0
        0x3f80_0000, // 1
        0xbf80_0000, // -1
        0x7f80_0000, // infinity
        0xff80_0000,
        0x7fc0_0000, // quiet NaN
        0x7f80_0001, // signalling NaN
        0xffc1_2345,
        0x0000_0001, // the smallest denormal
        0x807f_ffff, // the largest denormal
        0x0080_0000, // the smallest normal
        0x7f7f_ffff, // the largest
        0x4f00_0000, // 2^31
    ];
    match rng.u8(..8) {
        0..3 => CORNERS[rng.usize(..CORNERS.len())],
        3..5 => (f32::from(rng.i16(-1000..1000)) / 8.0).to_bits(),
        5 => 0x3f80_0000 ^ (rng.u32(..) & 0x80ff_ffff),
        _ => rng.u32(..),
    }
}

/// A double-precision number, as its bits.
pub fn double(rng: &mut Rng) -> u64 {
    const CORNERS: [u64; 14] = [
        0x0000_0000_0000_0000,
        0x8000_0000_0000_0000,
        0x3ff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0x7ff0_0000_0000_0001,
        0xfff8_1234_5678_9abc,
        0x0000_0000_0000_0001,
        0x800f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x43e0_0000_0000_0000,
    ];
    match rng.u8(..8) {
        0..3 => CORNERS[rng.usize(..CORNERS.len())],
        3..5 => (f64::from(rng.i32(-100_000..100_000)) / 64.0).to_bits(),
        5 => 0x3ff0_0000_0000_0000 ^ (rng.u64(..) & 0x801f_ffff_ffff_ffff),
        _ => rng.u64(..),
    }
}

/// An 80-bit number: significand, then sign and exponent. With unnormal and pseudo-denormal ones,
/// which memory can hold.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    const CORNERS: [(u64, u16); 16] = [
        (0, 0),
        (0, 0x8000),
        (1 << 63, 0x3fff),
        (1 << 63, 0xbfff),
        (1 << 63, 0x7fff), // infinity
        (1 << 63, 0xffff),
        (3 << 62, 0x7fff),            // quiet NaN
        (1 << 63 | 1, 0x7fff),        // signalling NaN
        (3 << 62, 0xffff),            // the indefinite
        (1, 0),                       // denormal
        (1 << 63, 0),                 // pseudo-denormal
        (1 << 62, 0x4000),            // unnormal: invalid since the 387
        (0, 0x7fff),                  // pseudo-infinity: invalid
        (u64::MAX, 0x7ffe),           // the largest
        (0xc90fdaa22168c235, 0x4000), // pi
        (1 << 63, 0x403e),            // 2^63
    ];
    let (significand, exponent) = match rng.u8(..8) {
        0..3 => CORNERS[rng.usize(..CORNERS.len())],
        3..5 => (rng.u64(..) | 1 << 63, 0x3fff + rng.u16(..16) - 8),
        5 => (rng.u64(..) | 1 << 63, rng.u16(..)),
        6 => (rng.u64(..), 0xffff), // what MMX instructions leave
        _ => (rng.u64(..), rng.u16(..)),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// What a vector register or a piece of memory holds: numbers of one kind, or anything.
pub fn fill(rng: &mut Rng, bytes: &mut [u8]) {
    match rng.u8(..8) {
        0..2 => chunks(bytes, 4, || u64::from(single(rng))),
        2..4 => chunks(bytes, 8, || double(rng)),
        4..6 => {
            let size = 1 << rng.u8(..4);
            chunks(bytes, size, || integer(rng));
        }
        6 => chunks(bytes, 16, || rng.u64(..64)),
        _ => rng.fill(bytes),
    }
    if bytes.len() >= 10 && rng.u8(..8) == 0 {
        bytes[..10].copy_from_slice(&extended(rng));
    }
}

fn chunks(bytes: &mut [u8], size: usize, mut value: impl FnMut() -> u64) {
    for chunk in bytes.chunks_mut(size) {
        let value = u128::from(value()).to_le_bytes();
        chunk.copy_from_slice(&value[..chunk.len()]);
    }
}
