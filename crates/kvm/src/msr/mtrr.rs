//! Memory type range registers: kept, checked, and without effect, for guest memory is ordinary
//! cached memory of the host (`arch/x86/kvm/mtrr.c`).

use super::Refused;
use super::index::{
    MTRR_CAP, MTRR_DEF_TYPE, MTRR_FIX4K, MTRR_FIX4K_LAST, MTRR_FIX16K, MTRR_FIX16K_LAST,
    MTRR_FIX64K, MTRR_PHYS_BASE0, MTRR_PHYS_LAST,
};

/// Fixed ranges, write combining, eight variable ranges.
const CAPABILITIES: u64 = 0x508;

/// The registers of one vCPU.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mtrrs {
    variable: [u64; 16],
    fixed: [u64; 11],
    default_type: u64,
}

/// Uncacheable, write combining, write through, write protect, write back.
fn is_type(value: u64) -> bool {
    matches!(value & 0xff, 0 | 1 | 4 | 5 | 6)
}

fn fixed_slot(index: u32) -> Option<usize> {
    Some(match index {
        MTRR_FIX64K => 0,
        MTRR_FIX16K..=MTRR_FIX16K_LAST => 1 + (index - MTRR_FIX16K) as usize,
        MTRR_FIX4K..=MTRR_FIX4K_LAST => 3 + (index - MTRR_FIX4K) as usize,
        _ => return None,
    })
}

impl Mtrrs {
    /// Whether the number is one of theirs.
    pub(crate) fn owns(index: u32) -> bool {
        matches!(
            index,
            MTRR_CAP | MTRR_DEF_TYPE | MTRR_PHYS_BASE0..=MTRR_PHYS_LAST
        ) || fixed_slot(index).is_some()
    }

    pub(crate) fn read(&self, index: u32) -> Result<u64, Refused> {
        match index {
            MTRR_CAP => Ok(CAPABILITIES),
            MTRR_DEF_TYPE => Ok(self.default_type),
            MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => {
                Ok(self.variable[(index - MTRR_PHYS_BASE0) as usize])
            }
            _ => fixed_slot(index)
                .map(|i| self.fixed[i])
                .ok_or(Refused::Invalid),
        }
    }

    pub(crate) fn write(
        &mut self,
        index: u32,
        value: u64,
        physical_bits: u32,
    ) -> Result<(), Refused> {
        let too_high = !0u64 << physical_bits.clamp(32, 52);
        match index {
            MTRR_DEF_TYPE if value & !0xcff == 0 && is_type(value) => self.default_type = value,
            MTRR_PHYS_BASE0..=MTRR_PHYS_LAST => {
                let is_base = index & 1 == 0;
                let bad_bits = if is_base { 0xf00 } else { 0x7ff };
                if value & (bad_bits | too_high) != 0 || is_base && !is_type(value) {
                    return Err(Refused::Invalid);
                }
                self.variable[(index - MTRR_PHYS_BASE0) as usize] = value;
            }
            _ => {
                let slot = fixed_slot(index).ok_or(Refused::Invalid)?;
                if !(0..8).all(|byte| is_type(value >> (8 * byte))) {
                    return Err(Refused::Invalid);
                }
                self.fixed[slot] = value;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_types_are_refused() {
        let mut mtrrs = Mtrrs::default();
        assert!(mtrrs.write(MTRR_DEF_TYPE, 0xc06, 46).is_ok());
        assert_eq!(mtrrs.read(MTRR_DEF_TYPE), Ok(0xc06));
        assert!(mtrrs.write(MTRR_DEF_TYPE, 0xc02, 46).is_err());
        assert!(mtrrs.write(MTRR_FIX64K, 0x0606_0606_0606_0603, 46).is_err());
        assert!(
            mtrrs
                .write(MTRR_FIX4K_LAST, 0x0606_0606_0606_0606, 46)
                .is_ok()
        );
        assert!(mtrrs.write(MTRR_PHYS_BASE0, 1 << 50, 46).is_err());
        assert!(mtrrs.write(MTRR_CAP, 0, 46).is_err(), "read only");
    }
}
