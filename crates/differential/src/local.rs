//! The local descriptor table, the same on both sides: what 16-bit code needs.
//!
//! A process can't have 16-bit segments but by `modify_ldt`. Code of 16 bits begins with CS at the
//! code window and the other segments at the data as seen from the first of
//! [`crate::layout::WINDOWS`]; each has another limit or kind, so that every check of a segment is
//! met.

use addr::Gva;
use x86::descriptor::attributes as bits;

use crate::case::selector;
use crate::layout::{CODE, CODE_BYTES, WINDOWS};

/// What a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 16-bit code that can be read.
    Code,
    /// Data that can be written.
    Data,
    /// Data that lies above its limit.
    ExpandDown,
    /// Data that can't be written.
    ReadOnly,
}

/// An entry of the table. All are of CPL 3, 16 bits wide, and accessed.
#[derive(Clone, Copy, Debug)]
pub struct Local {
    /// The first byte.
    pub base: Gva,
    /// The limit in bytes.
    pub limit: u16,
    /// What it is.
    pub kind: Kind,
}

/// The table.
pub const ENTRIES: [Local; 5] = [
    Local::new(CODE, CODE_BYTES as u16 - 1, Kind::Code),
    Local::new(WINDOWS[0], 0xffff, Kind::Data),
    Local::new(WINDOWS[0], 0x37ff, Kind::Data),
    Local::new(WINDOWS[0], 0x07ff, Kind::ExpandDown),
    Local::new(WINDOWS[0], 0xffff, Kind::ReadOnly),
];

/// The segments of 16-bit code, as [`selector`] numbers them.
pub const SELECTORS: [u16; 6] = {
    let mut selectors = [0; 6];
    selectors[selector::ES] = name(2);
    selectors[selector::CS] = name(0);
    selectors[selector::SS] = name(1);
    selectors[selector::DS] = name(1);
    selectors[selector::FS] = name(3);
    selectors[selector::GS] = name(4);
    selectors
};

/// The selector of an entry, with RPL 3.
pub const fn name(index: u16) -> u16 {
    index << 3 | 7
}

impl Local {
    const fn new(base: Gva, limit: u16, kind: Kind) -> Self {
        Self { base, limit, kind }
    }

    /// Access rights as [`cpu::Segment`] has them.
    pub fn attributes(&self) -> u16 {
        let kind = match self.kind {
            Kind::Code => bits::CODE | bits::WRITABLE_READABLE,
            Kind::Data => bits::WRITABLE_READABLE,
            Kind::ExpandDown => bits::DOWN_CONFORMING | bits::WRITABLE_READABLE,
            Kind::ReadOnly => 0,
        };
        // S, present, DPL 3.
        kind | bits::ACCESSED | 0xf0
    }

    /// The descriptor (SDM 3A, 3.4.5).
    pub fn descriptor(&self) -> u64 {
        let base = self.base.raw();
        u64::from(self.limit)
            | (base & 0xff_ffff) << 16
            | u64::from(self.attributes()) << 40
            | (base >> 24) << 56
    }
}

/// The entry that a selector names.
pub fn find(selector: u16) -> Option<&'static Local> {
    if selector & 4 == 0 {
        return None;
    }
    ENTRIES.get(usize::from(selector >> 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_as_linux_writes_them() {
        assert_eq!(ENTRIES[0].descriptor(), 0x1000_fb00_0000_3fff);
        assert_eq!(ENTRIES[1].descriptor(), 0x2000_f300_0000_ffff);
        assert_eq!(find(name(4)).map(|local| local.kind), Some(Kind::ReadOnly));
        assert!(find(0x2b).is_none());
        assert!(find(0x7f).is_none());
    }
}
