//! Addresses and 4 KiB frames of each space.

use core::fmt;
use core::hash::Hash;

use crate::PageSize;

/// What an address of any space can do.
///
/// Implemented by [`Gva`], [`Gpa`], [`Hva`] and [`Hpa`] alone.
pub trait Address: Copy + Ord + Hash + fmt::Debug + fmt::Display + fmt::LowerHex {
    /// The address with this number.
    fn new(raw: u64) -> Self;
    /// The number of this address.
    fn raw(self) -> u64;

    /// `self + bytes`, or `None` past the end of the 64-bit space.
    fn checked_add(self, bytes: u64) -> Option<Self> {
        self.raw().checked_add(bytes).map(Self::new)
    }

    /// `self - bytes`, or `None` below zero.
    fn checked_sub(self, bytes: u64) -> Option<Self> {
        self.raw().checked_sub(bytes).map(Self::new)
    }

    /// `self + bytes` modulo 2^64, as the CPU computes effective addresses.
    #[must_use]
    fn wrapping_add(self, bytes: u64) -> Self {
        Self::new(self.raw().wrapping_add(bytes))
    }

    /// How far `self` lies above `base`, or `None` where it lies below.
    fn offset_from(self, base: Self) -> Option<u64> {
        self.raw().checked_sub(base.raw())
    }

    /// The offset within a page of this size.
    fn page_offset(self, size: PageSize) -> u64 {
        self.raw() & size.offset_mask()
    }

    /// The start of the page of this size that holds the address.
    #[must_use]
    fn align_down(self, size: PageSize) -> Self {
        Self::new(self.raw() & !size.offset_mask())
    }

    /// Whether a page of this size can start here.
    fn is_aligned(self, size: PageSize) -> bool {
        self.page_offset(size) == 0
    }
}

/// What a frame number of any space can do: an address in units of 4 KiB.
pub trait Frame: Copy + Ord + Hash + fmt::Debug {
    /// The address space that this frame belongs to.
    type Addr: Address;
    /// The frame with this number.
    fn new(number: u64) -> Self;
    /// The number of this frame.
    fn number(self) -> u64;

    /// The first address of the frame.
    ///
    /// Frame numbers come from addresses, so the shift loses no bits.
    fn start(self) -> Self::Addr {
        Self::Addr::new(self.number() << PageSize::Size4K.shift())
    }

    /// The frame that holds `addr`.
    fn containing(addr: Self::Addr) -> Self {
        Self::new(addr.raw() >> PageSize::Size4K.shift())
    }
}

macro_rules! address_space {
    ($(#[$addr_doc:meta])* $addr:ident, $(#[$frame_doc:meta])* $frame:ident, $tag:literal) => {
        $(#[$addr_doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $addr(u64);

        impl $addr {
            /// The address with this number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The number of this address.
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The 4 KiB frame that holds this address.
            pub const fn frame(self) -> $frame {
                $frame(self.0 >> PageSize::Size4K.shift())
            }
        }

        impl Address for $addr {
            fn new(raw: u64) -> Self {
                Self(raw)
            }
            fn raw(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(self, f)
            }
        }

        impl fmt::LowerHex for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        $(#[$frame_doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $frame(u64);

        impl $frame {
            /// The frame with this number.
            pub const fn new(number: u64) -> Self {
                Self(number)
            }

            /// The number of this frame.
            pub const fn number(self) -> u64 {
                self.0
            }
        }

        impl Frame for $frame {
            type Addr = $addr;
            fn new(number: u64) -> Self {
                Self(number)
            }
            fn number(self) -> u64 {
                self.0
            }
        }
    };
}

address_space!(
    /// A guest virtual address: what the guest's instruction names, after segmentation
    /// (the manuals' "linear address").
    Gva,
    /// A guest virtual page number.
    Gvn,
    "gva"
);
address_space!(
    /// A guest physical address: what the guest believes is its RAM or its devices.
    Gpa,
    /// A guest physical frame number.
    Gfn,
    "gpa"
);
address_space!(
    /// A host virtual address: where the monitor's process keeps guest memory.
    Hva,
    /// A host virtual page number.
    Hfn,
    "hva"
);
address_space!(
    /// A host physical address: the page frame that the host machine really uses.
    Hpa,
    /// A host page frame number, as `/proc/PID/pagemap` reports it.
    Pfn,
    "hpa"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_stays_in_the_space() {
        assert_eq!(Gpa::new(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa::new(0).checked_sub(1), None);
        assert_eq!(Gva::new(u64::MAX).wrapping_add(1), Gva::new(0));
        assert_eq!(Hva::new(0x3000).offset_from(Hva::new(0x1000)), Some(0x2000));
        assert_eq!(Hva::new(0x1000).offset_from(Hva::new(0x3000)), None);
    }

    #[test]
    fn pages_and_frames() {
        let gpa = Gpa::new(0x20_1234);
        assert_eq!(gpa.align_down(PageSize::Size2M), Gpa::new(0x20_0000));
        assert_eq!(gpa.page_offset(PageSize::Size4K), 0x234);
        assert_eq!(gpa.frame(), Gfn::new(0x201));
        assert_eq!(gpa.frame().start(), Gpa::new(0x20_1000));
    }
}
