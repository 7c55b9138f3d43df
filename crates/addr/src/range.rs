//! Half-open ranges of addresses that never wrap.

use core::fmt;

use crate::Address;

/// `len` bytes from `start`. The last byte is inside the space: a range that would wrap can't be
/// made, so `end()` needs no check (a range may end at 2^64 - 1, not at 2^64).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range<A> {
    start: A,
    len: u64,
}

impl<A: Address> Range<A> {
    /// The range of `len` bytes from `start`, or `None` where it would leave the 64-bit space.
    pub fn new(start: A, len: u64) -> Option<Self> {
        start.checked_add(len).map(|_| Self { start, len })
    }

    /// The range from `start` up to and without `end`, or `None` where `end` lies below `start`.
    pub fn between(start: A, end: A) -> Option<Self> {
        end.offset_from(start).map(|len| Self { start, len })
    }

    /// The first address.
    pub fn start(self) -> A {
        self.start
    }

    /// The first address behind the range.
    pub fn end(self) -> A {
        A::new(self.start.raw() + self.len)
    }

    /// The number of bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether `addr` lies inside.
    pub fn contains(self, addr: A) -> bool {
        self.offset_of(addr).is_some()
    }

    /// How far `addr` lies behind the start, or `None` where it lies outside.
    pub fn offset_of(self, addr: A) -> Option<u64> {
        addr.offset_from(self.start).filter(|o| *o < self.len)
    }

    /// Whether all of `other` lies inside.
    pub fn contains_range(self, other: Self) -> bool {
        other.start >= self.start && other.end() <= self.end()
    }

    /// The bytes that both hold, or `None` where they share none.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        Self::between(start, end).filter(|r| !r.is_empty())
    }

    /// Whether they share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }
}

impl<A: Address> fmt::Display for Range<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start(), self.end())
    }
}

impl<A: Address> fmt::Debug for Range<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;

    fn range(start: u64, len: u64) -> Range<Gpa> {
        Range::new(Gpa::new(start), len).unwrap()
    }

    #[test]
    fn never_wraps() {
        assert_eq!(Range::new(Gpa::new(u64::MAX), 1), None);
        assert!(Range::new(Gpa::new(u64::MAX), 0).is_some());
    }

    #[test]
    fn set_operations() {
        let a = range(0x1000, 0x2000);
        assert!(a.contains(Gpa::new(0x2fff)));
        assert!(!a.contains(Gpa::new(0x3000)));
        assert_eq!(
            a.intersection(range(0x2000, 0x4000)),
            Some(range(0x2000, 0x1000))
        );
        assert!(!a.overlaps(range(0x3000, 0x1000)));
        assert!(a.contains_range(range(0x1000, 0x2000)));
    }
}
