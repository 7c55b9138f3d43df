//! An entry of a shadow page.
//!
//! | state | bits                                                   | meaning                          |
//! |-------|--------------------------------------------------------|----------------------------------|
//! | empty | 0                                                      | nothing cached: walk the guest   |
//! | link  | `PRESENT`, rights, attributes, shadow page             | the guest's entry points to a table, which this page shadows |
//! | link  | the same and `GUEST_PAGE`                              | the guest's entry maps a large page that can't be mapped as one: below are direct pages |
//! | leaf  | `PRESENT`, `LEAF`, rights, attributes, host page       | maps a page, reads may go on     |
//! | leaf  | the same and `HOST_WRITE`                              | writes may go on, if the guest's rights and D allow them |
//!
//! Rights are those of the one guest entry; a look-up takes what all entries on its way grant.
//! Attributes (G, D, protection key) are those of the guest's entry that maps the page. In direct
//! pages all rights are granted and no attribute is set: the link above them says it.

use addr::{Frame, Hfn, Hva};

use crate::rights::Rights;

const PRESENT: u64 = 1 << 0;
const LEAF: u64 = 1 << 1;
const RIGHTS_SHIFT: u32 = 2;
const GLOBAL: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// In a leaf.
const HOST_WRITE: u64 = 1 << 7;
/// In a link.
const GUEST_PAGE: u64 = 1 << 7;
const KEY_SHIFT: u32 = 8;
const ADDRESS: u64 = !0xfff;

/// What the guest's entry that maps a page says beyond rights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) global: bool,
    pub(super) dirty: bool,
    pub(super) key: u8,
}

/// Where a link leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    /// A table of the guest's.
    Table,
    /// Parts of one large page of the guest's.
    Parts,
}

/// One entry, as loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    pub(super) fn leaf(first: Hfn, rights: Rights, attributes: Attributes) -> Self {
        Self(first.start().raw() | PRESENT | LEAF | flags(rights, attributes))
    }

    pub(super) fn link(address: u64, below: Below, rights: Rights, attributes: Attributes) -> Self {
        let guest_page = if below == Below::Parts { GUEST_PAGE } else { 0 };
        Self(address | PRESENT | guest_page | flags(rights, attributes))
    }

    pub(super) fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    pub(super) fn is_leaf(self) -> bool {
        self.0 & (PRESENT | LEAF) == PRESENT | LEAF
    }

    pub(super) fn is_link(self) -> bool {
        self.0 & (PRESENT | LEAF) == PRESENT
    }

    /// Whether the guest's entry at this link maps a page.
    pub(super) fn is_guest_page(self) -> bool {
        self.is_link() && self.0 & GUEST_PAGE != 0
    }

    /// The first host frame of a leaf.
    pub(super) fn frame(self) -> Hfn {
        Hva::new(self.0 & ADDRESS).frame()
    }

    /// The address of the shadow page of a link.
    pub(super) fn address(self) -> u64 {
        self.0 & ADDRESS
    }

    pub(super) fn rights(self) -> Rights {
        Rights::from_bits_truncate((self.0 >> RIGHTS_SHIFT) as u8 & 0b111)
    }

    pub(super) fn attributes(self) -> Attributes {
        Attributes {
            global: self.0 & GLOBAL != 0,
            dirty: self.0 & DIRTY != 0,
            key: (self.0 >> KEY_SHIFT) as u8 & 0xf,
        }
    }

    /// Whether a leaf takes writes.
    pub(super) fn host_writable(self) -> bool {
        self.is_leaf() && self.0 & HOST_WRITE != 0
    }

    /// The same leaf, taking writes.
    pub(super) fn allow_writes(self) -> Self {
        debug_assert!(self.is_leaf(), "links have no such bit");
        Self(self.0 | HOST_WRITE)
    }

    /// The same leaf, not taking writes.
    pub(super) fn refuse_writes(self) -> Self {
        debug_assert!(self.is_leaf(), "links have no such bit");
        Self(self.0 & !HOST_WRITE)
    }
}

fn flags(rights: Rights, attributes: Attributes) -> u64 {
    let mut flags = u64::from(rights.bits()) << RIGHTS_SHIFT;
    if attributes.global {
        flags |= GLOBAL;
    }
    if attributes.dirty {
        flags |= DIRTY;
    }
    flags | u64::from(attributes.key & 0xf) << KEY_SHIFT
}

impl Attributes {
    /// What both say together.
    pub(super) fn union(self, other: Self) -> Self {
        Self {
            global: self.global | other.global,
            dirty: self.dirty | other.dirty,
            key: self.key | other.key,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let attributes = Attributes {
            global: true,
            dirty: false,
            key: 9,
        };
        let rights = Rights::WRITE | Rights::EXECUTE;
        let leaf = Entry::leaf(Hfn::new(0x7f123), rights, attributes);
        assert!(leaf.is_leaf() && !leaf.is_link() && !leaf.host_writable());
        assert!(leaf.allow_writes().host_writable());
        assert_eq!(leaf.allow_writes().refuse_writes(), leaf);
        assert_eq!(
            (leaf.frame(), leaf.rights(), leaf.attributes()),
            (Hfn::new(0x7f123), rights, attributes)
        );
        let link = Entry::link(0x5000, Below::Parts, rights, attributes);
        assert!(link.is_guest_page() && !link.host_writable());
        assert_eq!(link.address(), 0x5000);
    }
}
