//! Entries of the guest's page tables (SDM 3A, chapter 5; APM 2, chapter 5).
//!
//! | mode    | CR0.PG | CR4.PAE | EFER.LME | CR4.LA57 | levels | entry   | index bits |
//! |---------|--------|---------|----------|----------|--------|---------|------------|
//! | off     | 0      |         |          |          | 0      |         |            |
//! | 32-bit  | 1      | 0       |          |          | 2      | 4 bytes | 10         |
//! | PAE     | 1      | 1       | 0        |          | 3 (PDPTEs in registers) | 8 bytes | 9 (top: 2) |
//! | 4-level | 1      | 1       | 1        | 0        | 4      | 8 bytes | 9          |
//! | 5-level | 1      | 1       | 1        | 1        | 5      | 8 bytes | 9          |

use bitflags::bitflags;

use crate::control::{Cr0, Cr4, Efer};

bitflags! {
    /// Bits of an entry. 32-bit entries have those below bit 32.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Pte: u64 {
        /// Present.
        const P = 1 << 0;
        /// Writable.
        const RW = 1 << 1;
        /// User.
        const US = 1 << 2;
        /// Write-through.
        const PWT = 1 << 3;
        /// Cache disable.
        const PCD = 1 << 4;
        /// Accessed.
        const A = 1 << 5;
        /// Dirty (an entry that maps a page).
        const D = 1 << 6;
        /// Page size: this entry of level 2 or above maps a page. At level 1 the same bit is PAT.
        const PS = 1 << 7;
        /// Global (an entry that maps a page).
        const G = 1 << 8;
        /// PAT of a large page; in PSE-36 pages too.
        const PAT_LARGE = 1 << 12;
        /// No execute.
        const NX = 1 << 63;
        /// All others: addresses, protection key, bits for software.
        const _ = !0;
    }
}

impl Pte {
    /// The protection key of an entry that maps a page in 4- and 5-level paging, bits 62:59.
    pub const fn protection_key(self) -> u8 {
        ((self.bits() >> 59) & 0xf) as u8
    }
}

/// The address bits of a 64-bit entry, before MAXPHYADDR is taken into account.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// The address bits of a 32-bit entry.
pub const ADDRESS_MASK_32: u64 = 0xffff_f000;
/// The reserved bits of a PAE PDPTE below the address: 2:1 and 8:5 (SDM 3A, table 5-8).
pub const PDPTE_RESERVED_LOW: u64 = 0x1e6;

/// How linear addresses are translated (SDM 3A, 5.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// Linear addresses are physical ones.
    #[default]
    Off,
    /// Two levels of 32-bit entries.
    Bits32,
    /// Four PDPTEs in registers, two levels of 64-bit entries.
    Pae,
    /// Four levels, 48-bit linear addresses.
    Level4,
    /// Five levels, 57-bit linear addresses.
    Level5,
}

impl PagingMode {
    /// The mode that these registers select.
    pub fn of(cr0: Cr0, cr4: Cr4, efer: Efer) -> Self {
        if !cr0.contains(Cr0::PG) {
            Self::Off
        } else if !cr4.contains(Cr4::PAE) {
            Self::Bits32
        } else if !efer.intersects(Efer::LME | Efer::LMA) {
            Self::Pae
        } else if cr4.contains(Cr4::LA57) {
            Self::Level5
        } else {
            Self::Level4
        }
    }

    /// Levels of tables in memory.
    pub const fn levels(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Bits32 | Self::Pae => 2,
            Self::Level4 => 4,
            Self::Level5 => 5,
        }
    }

    /// Bytes of one entry.
    pub const fn entry_bytes(self) -> u64 {
        match self {
            Self::Bits32 => 4,
            _ => 8,
        }
    }

    /// Bits of the linear address that one level consumes.
    pub const fn index_bits(self) -> u32 {
        match self {
            Self::Bits32 => 10,
            _ => 9,
        }
    }

    /// The lowest bit of the linear address that an entry of this level (1 is the lowest) does not
    /// leave to the levels below: log2 of the bytes it covers.
    pub const fn level_shift(self, level: u8) -> u32 {
        12 + self.index_bits() * (level as u32 - 1)
    }

    /// Whether the mode is one of IA-32e.
    pub const fn is_long(self) -> bool {
        matches!(self, Self::Level4 | Self::Level5)
    }

    /// Bits of a linear address that take part in translation.
    pub const fn linear_bits(self) -> u32 {
        match self {
            Self::Off | Self::Bits32 | Self::Pae => 32,
            Self::Level4 => 48,
            Self::Level5 => 57,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        let of = |cr4, efer| PagingMode::of(Cr0::PG | Cr0::PE, cr4, efer);
        assert_eq!(
            PagingMode::of(Cr0::PE, Cr4::PAE, Efer::LME),
            PagingMode::Off
        );
        assert_eq!(of(Cr4::PSE, Efer::empty()), PagingMode::Bits32);
        assert_eq!(of(Cr4::PAE, Efer::NXE), PagingMode::Pae);
        assert_eq!(of(Cr4::PAE, Efer::LME), PagingMode::Level4);
        assert_eq!(of(Cr4::PAE | Cr4::LA57, Efer::LMA), PagingMode::Level5);
    }

    #[test]
    fn shifts() {
        assert_eq!(PagingMode::Bits32.level_shift(2), 22);
        assert_eq!(PagingMode::Level5.level_shift(5), 48);
    }
}
