//! Components of the extended state and the XSAVE area (SDM 1, chapter 13).

/// XCR0: x87.
pub const X87: u64 = 1 << 0;
/// XCR0: SSE.
pub const SSE: u64 = 1 << 1;
/// XCR0: upper halves of YMM.
pub const AVX: u64 = 1 << 2;
/// XCR0: MPX bound registers and configuration; both or none.
pub const MPX: u64 = 3 << 3;
/// XCR0: AVX-512 masks, upper halves of ZMM0-15, ZMM16-31; all or none.
pub const AVX512: u64 = 7 << 5;
/// XCR0: PKRU.
pub const PKRU: u64 = 1 << 9;

/// Offset of the legacy region's MXCSR.
pub const MXCSR_OFFSET: usize = 24;
/// Offset of the legacy region's XMM registers.
pub const XMM_OFFSET: usize = 160;
/// Size of the legacy region, and offset of the header.
pub const LEGACY_SIZE: usize = 512;
/// Offset of `XSTATE_BV`.
pub const XSTATE_BV_OFFSET: usize = 512;
/// Offset of `XCOMP_BV`.
pub const XCOMP_BV_OFFSET: usize = 520;
/// Size of the header.
pub const HEADER_SIZE: usize = 64;
/// Offset of the first extended component.
pub const EXTENDED_OFFSET: usize = LEGACY_SIZE + HEADER_SIZE;
/// Offset of the AVX component in the standard format.
pub const AVX_OFFSET: usize = 576;
/// Size of the AVX component.
pub const AVX_SIZE: usize = 256;
/// `XCOMP_BV`: the compacted format.
pub const XCOMP_BV_COMPACTED: u64 = 1 << 63;
/// MXCSR after a reset.
pub const MXCSR_INIT: u32 = 0x1f80;
/// The x87 control word after `FNINIT`.
pub const FCW_INIT: u16 = 0x37f;

/// Whether this value may be written to XCR0 on a CPU that offers `supported` (SDM 1, 13.3).
pub const fn xcr0_is_valid(value: u64, supported: u64) -> bool {
    value & X87 != 0
        && value & !supported == 0
        && (value & AVX == 0 || value & SSE != 0)
        && (value & MPX == 0 || value & MPX == MPX)
        && (value & AVX512 == 0 || value & (AVX512 | AVX) == AVX512 | AVX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_combinations() {
        let all = X87 | SSE | AVX | AVX512;
        assert!(xcr0_is_valid(X87, all));
        assert!(xcr0_is_valid(X87 | SSE | AVX, all));
        assert!(!xcr0_is_valid(SSE, all), "x87 can't be off");
        assert!(!xcr0_is_valid(X87 | AVX, all), "AVX needs SSE");
        assert!(
            !xcr0_is_valid(X87 | SSE | AVX | 1 << 5, all),
            "AVX-512 in whole"
        );
        assert!(!xcr0_is_valid(X87 | PKRU, all), "not offered");
    }
}
