//! Bodies that random bytes drive: the ordinary tests feed them from seeds, the fuzz targets
//! (`fuzz/`) from a fuzzer.
#![allow(dead_code, reason = "each test that includes this uses a part of it")]

pub(crate) mod calls;
pub(crate) mod machine;
pub(crate) mod space;

/// Bytes that look random: `SplitMix64` from a seed.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    });
    words.flat_map(u64::to_le_bytes).take(len).collect()
}
