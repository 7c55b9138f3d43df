//! Page sizes of x86-64, including the 4 MiB pages of 32-bit paging with PSE.

use core::fmt;

/// A size that one page-table entry can map (SDM 3A, 5.3 to 5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, in every paging mode.
    Size4K,
    /// 2 MiB, in PAE, 4-level and 5-level paging.
    Size2M,
    /// 4 MiB, in 32-bit paging with `CR4.PSE`.
    Size4M,
    /// 1 GiB, in 4-level and 5-level paging.
    Size1G,
}

impl PageSize {
    /// Log2 of the size in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size4M => 22,
            Self::Size1G => 30,
        }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The bits of an address below the page's own: `bytes() - 1`.
    pub const fn offset_mask(self) -> u64 {
        self.bytes() - 1
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size4M => "4 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}
