//! Fixed-point arithmetic of clocks: TSC scaling ratios, and pvclock's shift and multiplier.

/// A TSC scaling ratio with 32 fractional bits (APM 2, 15.30.5: `TSC_RATIO`'s format).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio(pub u64);

impl Ratio {
    /// Not scaled.
    pub const ONE: Ratio = Ratio(1 << 32);
    /// The first ratio too large: 8 integer bits.
    const LIMIT: u64 = 1 << 40;

    /// The least frequency that a guest can't have on a host of `host_khz`.
    pub fn limit_khz(host_khz: u32) -> u32 {
        let limit = (u128::from(Self::LIMIT) * u128::from(host_khz)) >> 32;
        u32::try_from(limit).unwrap_or(u32::MAX).min(0x7fff_ffff)
    }

    /// The ratio that makes a host of `host_khz` look like `guest_khz`, where it can be expressed.
    pub fn of(guest_khz: u32, host_khz: u32) -> Option<Ratio> {
        let ratio = (u64::from(guest_khz) << 32).checked_div(u64::from(host_khz))?;
        (ratio != 0 && ratio < Self::LIMIT).then_some(Ratio(ratio))
    }

    /// `value` times the ratio, modulo 2^64.
    pub fn scale(self, value: u64) -> u64 {
        if self == Ratio::ONE {
            return value;
        }
        ((u128::from(value) * u128::from(self.0)) >> 32) as u64
    }
}

/// A conversion between frequencies as pvclock writes it: shift left (or right, where negative),
/// multiply, and take the upper 64 of 96 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "pvclock's names")]
pub struct PvScale {
    pub shift: i8,
    pub multiplier: u32,
}

impl PvScale {
    /// The conversion of a count at `from_hz` to one at `to_hz`. Both must be above 0.
    pub fn between(from_hz: u64, to_hz: u64) -> PvScale {
        const HIGH: u64 = 0xffff_ffff_0000_0000;
        let (mut base, mut scaled, mut shift) = (from_hz.max(1), to_hz.max(1), 0i8);
        while base > scaled * 2 || base & HIGH != 0 {
            base >>= 1;
            shift -= 1;
        }
        let mut base = base as u32;
        while u64::from(base) <= scaled || scaled & HIGH != 0 {
            if scaled & HIGH != 0 || base & 0x8000_0000 != 0 {
                scaled >>= 1;
            } else {
                base <<= 1;
            }
            shift += 1;
        }
        PvScale {
            shift,
            multiplier: ((scaled << 32) / u64::from(base)) as u32,
        }
    }

    /// `delta` converted.
    pub fn apply(self, delta: u64) -> u64 {
        let shifted = if self.shift < 0 {
            delta >> self.shift.unsigned_abs()
        } else {
            delta << self.shift
        };
        ((u128::from(shifted) * u128::from(self.multiplier)) >> 32) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_that_cannot_be_expressed() {
        assert_eq!(Ratio::of(2_000_000, 2_000_000), Some(Ratio::ONE));
        assert_eq!(Ratio::of(u32::MAX, 1), None);
        assert_eq!(Ratio::of(0, 1), None);
        assert_eq!(Ratio::of(1, 0), None);
    }

    #[test]
    fn one_second_of_cycles_is_one_second() {
        for hz in [
            1_000_000,
            999_999_937,
            2_445_421_000,
            3_000_000_000,
            5_700_000_000,
        ] {
            let ns = PvScale::between(hz, 1_000_000_000).apply(hz);
            assert!(ns.abs_diff(1_000_000_000) <= 2, "{hz} Hz: {ns} ns");
        }
    }
}
