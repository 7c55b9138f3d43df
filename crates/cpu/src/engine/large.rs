//! Where pieces of large pages are in the TLB, which holds 4 KiB pages.
//!
//! `INVLPG` of any address in a large page drops all of its pieces (SDM 3A, 5.10.4.1). Looking for
//! them each time would cost a kernel that drops pages of its own, one by one, more than it gains by
//! that; so it is kept which regions of 2 MiB ever had a piece since the TLB was emptied. That is a
//! set by hash: a region may be taken for one that had some, whose entries are dropped in vain, never
//! the other way round. Pages of 1 GiB are more than the TLB holds: with one of them all goes.
//!
//! It speaks of the present entries and of those put aside.

use addr::{Gva, PageSize};

/// Pages of 4 KiB in a region.
pub(super) const REGION_PAGES: u64 = PageSize::Size2M.bytes() / PageSize::Size4K.bytes();
const WORDS: usize = 64;

/// What has to go with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    /// It alone.
    Page,
    /// All in these regions, by number.
    Regions(core::ops::Range<u64>),
    /// Everything.
    All,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct LargePages {
    regions: [u64; WORDS],
    /// Pages of two regions were among them.
    pairs: bool,
    /// Where pages of 1 GiB are: the lowest address and the highest.
    giants: Option<(u64, u64)>,
}

impl Default for LargePages {
    fn default() -> Self {
        Self {
            regions: [0; WORDS],
            pairs: false,
            giants: None,
        }
    }
}

fn region_of(gva: Gva) -> u64 {
    gva.raw() >> PageSize::Size2M.shift()
}

/// Word and bit of a region.
fn place(region: u64) -> (usize, u64) {
    let hash = region.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    (hash as usize / 64 % WORDS, 1 << (hash % 64))
}

impl LargePages {
    /// A piece of a page of this size is filled.
    pub(super) fn add(&mut self, gva: Gva, size: PageSize) {
        match size {
            PageSize::Size4K => {}
            PageSize::Size2M => self.add_region(region_of(gva)),
            PageSize::Size4M => {
                self.pairs = true;
                self.add_region(region_of(gva) & !1);
                self.add_region(region_of(gva) | 1);
            }
            PageSize::Size1G => {
                let first = gva.raw() & !size.offset_mask();
                let last = first | size.offset_mask();
                let (lowest, highest) = self.giants.unwrap_or((first, last));
                self.giants = Some((lowest.min(first), highest.max(last)));
            }
        }
    }

    fn add_region(&mut self, region: u64) {
        let (word, bit) = place(region);
        self.regions[word] |= bit;
    }

    /// What goes when the page of this address is invalidated.
    pub(super) fn dropped_with(&self, gva: Gva) -> Dropped {
        let region = region_of(gva);
        let (word, bit) = place(region);
        if self
            .giants
            .is_some_and(|(lowest, highest)| (lowest..=highest).contains(&gva.raw()))
        {
            Dropped::All
        } else if self.regions[word] & bit == 0 {
            Dropped::Page
        } else if self.pairs {
            Dropped::Regions(region & !1..(region | 1) + 1)
        } else {
            Dropped::Regions(region..region + 1)
        }
    }

    /// The TLB was emptied.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_with_a_page() {
        let mut large = LargePages::default();
        let (page, other) = (Gva::new(0x4030_5000), Gva::new(0xffff_c900_0000_1000));
        large.add(page, PageSize::Size4K);
        assert_eq!(large.dropped_with(page), Dropped::Page);
        large.add(Gva::new(0x4020_0000), PageSize::Size2M);
        assert_eq!(large.dropped_with(page), Dropped::Regions(0x201..0x202));
        assert_eq!(large.dropped_with(other), Dropped::Page);
        large.add(Gva::new(0x4020_0000), PageSize::Size4M);
        assert_eq!(large.dropped_with(page), Dropped::Regions(0x200..0x202));
        large.add(Gva::new(0x7fff_ffff), PageSize::Size1G);
        assert_eq!(large.dropped_with(page), Dropped::All);
        assert_eq!(large.dropped_with(Gva::new(0x8000_0000)), Dropped::Page);
        large.clear();
        assert_eq!(large.dropped_with(page), Dropped::Page);
    }
}
