//! Which bits of an entry must be 0 (SDM 3A, 5.3 to 5.5, tables 5-2 to 5-20).
//!
//! | mode    | entry                | reserved                                               |
//! |---------|----------------------|--------------------------------------------------------|
//! | 32-bit  | maps a 4 MiB page    | 21 down to M-19, with M = min(40, MAXPHYADDR) (PSE-36) |
//! | PAE     | every                | 62 down to MAXPHYADDR, 63 without NXE                  |
//! | PAE     | maps a 2 MiB page    | and 20:13                                              |
//! | 4, 5    | every                | 51 down to MAXPHYADDR, 63 without NXE                  |
//! | 4, 5    | maps a 2 MiB page    | and 20:13                                              |
//! | 4, 5    | maps a 1 GiB page    | and 29:13; PS itself where the CPU has no such pages   |
//! | 4, 5    | level 4 or 5         | and 7 (PS)                                             |
//! | 4, 5    | level 4 or 5, AMD    | and 8                                                  |

use x86::paging::PagingMode;

use crate::registers::{GigabytePages, PagingFeatures, Vendor};

/// Bits `low..=high`; none where `low` lies above `high`.
const fn bits(low: u32, high: u32) -> u64 {
    if low > high {
        return 0;
    }
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// Reserved bits by level (1 to 5) and by what the entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Reserved {
    /// Entries that point to a table.
    table: [u64; 5],
    /// Entries that map a page.
    page: [u64; 5],
}

impl Reserved {
    pub(crate) fn new(mode: PagingMode, features: PagingFeatures, nx: bool) -> Self {
        match mode {
            PagingMode::Off => Self::default(),
            PagingMode::Bits32 => Self::bits32(features),
            PagingMode::Pae => Self::pae(features, nx),
            PagingMode::Level4 | PagingMode::Level5 => Self::long(features, nx),
        }
    }

    /// The reserved bits of an entry at this level that maps a page.
    pub(crate) fn of_page(&self, level: u8) -> u64 {
        self.page[usize::from(level) - 1]
    }

    /// The reserved bits of an entry at this level that points to a table.
    pub(crate) fn of_table(&self, level: u8) -> u64 {
        self.table[usize::from(level) - 1]
    }

    fn bits32(features: PagingFeatures) -> Self {
        let m = features.physical_bits().min(40);
        let mut reserved = Self::default();
        reserved.page[1] = bits(m - 19, 21);
        reserved
    }

    fn pae(features: PagingFeatures, nx: bool) -> Self {
        let high = bits(features.physical_bits(), 62) | no_execute(nx);
        let mut reserved = Self {
            table: [high; 5],
            page: [high; 5],
        };
        reserved.page[1] |= bits(13, 20);
        reserved
    }

    fn long(features: PagingFeatures, nx: bool) -> Self {
        let high = bits(features.physical_bits(), 51) | no_execute(nx);
        let mut reserved = Self {
            table: [high; 5],
            page: [high; 5],
        };
        reserved.page[1] |= bits(13, 20);
        reserved.page[2] |= bits(13, 29);
        if features.gigabyte_pages == GigabytePages::Reserved {
            reserved.page[2] |= bits(7, 7);
        }
        let top = match features.vendor {
            Vendor::Intel => bits(7, 7),
            Vendor::Amd => bits(7, 8),
        };
        for level in 3..5 {
            reserved.table[level] |= top;
            reserved.page[level] |= top;
        }
        reserved
    }
}

fn no_execute(nx: bool) -> u64 {
    if nx { 0 } else { 1 << 63 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pse36_follows_maxphyaddr() {
        let of = |max_phys_bits| {
            let features = PagingFeatures {
                max_phys_bits,
                ..PagingFeatures::default()
            };
            Reserved::new(PagingMode::Bits32, features, false).of_page(2)
        };
        assert_eq!(of(32), 0x3f_e000, "no address bits above 31: 21:13");
        assert_eq!(of(36), 0x3e_0000, "21:17");
        assert_eq!(of(46), 0x20_0000, "at most 40 bits: 21");
    }

    #[test]
    fn long_mode() {
        let features = PagingFeatures::default();
        let reserved = Reserved::new(PagingMode::Level4, features, false);
        assert_eq!(reserved.of_page(1), 0x800f_c000_0000_0000);
        assert_eq!(reserved.of_page(3), 0x800f_c000_3fff_e000);
        assert_eq!(reserved.of_table(4), 0x800f_c000_0000_0080);
        let wide = PagingFeatures {
            max_phys_bits: 52,
            ..features
        };
        let reserved = Reserved::new(PagingMode::Level5, wide, true);
        assert_eq!(reserved.of_table(1), 0);
    }
}
