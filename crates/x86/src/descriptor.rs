//! Segment selectors, segment descriptors and gates (SDM 3A, 3.4, 3.5, 6.8, 7.11 and 7.14).

/// Attributes of a segment: the access bytes of its descriptor, in the bit positions of a VMCS
/// access-rights field.
pub mod attributes {
    /// Type field.
    pub const TYPE: u16 = 0xf;
    /// Accessed (code and data).
    pub const ACCESSED: u16 = 1 << 0;
    /// Writable (data) or readable (code).
    pub const WRITABLE_READABLE: u16 = 1 << 1;
    /// Expand-down (data) or conforming (code).
    pub const DOWN_CONFORMING: u16 = 1 << 2;
    /// Code rather than data.
    pub const CODE: u16 = 1 << 3;
    /// Code or data rather than a system segment.
    pub const S: u16 = 1 << 4;
    /// Descriptor privilege level, two bits.
    pub const DPL: u16 = 3 << 5;
    /// Position of [`DPL`].
    pub const DPL_SHIFT: u32 = 5;
    /// Present.
    pub const P: u16 = 1 << 7;
    /// Available to software.
    pub const AVL: u16 = 1 << 12;
    /// 64-bit code.
    pub const L: u16 = 1 << 13;
    /// Default operation size (code), stack-pointer size (stack), upper bound (expand-down).
    pub const DB: u16 = 1 << 14;
    /// Limit in units of 4 KiB.
    pub const G: u16 = 1 << 15;
    /// All that a descriptor holds.
    pub const ALL: u16 = 0xf0ff;
}

/// Types of system segments and gates.
pub mod system_type {
    #![allow(missing_docs, reason = "the manuals' names")]
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
    /// The bit that tells a busy TSS from an available one.
    pub const BUSY: u8 = 2;
}

/// A segment selector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub u16);

impl Selector {
    /// Requested privilege level.
    pub const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// Whether it names the LDT rather than the GDT.
    pub const fn is_local(self) -> bool {
        self.0 & 4 != 0
    }

    /// Whether it is one of the four null selectors.
    pub const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    /// Byte offset of its descriptor in the table.
    pub const fn offset(self) -> u16 {
        self.0 & !7
    }

    /// The same selector with another RPL.
    #[must_use]
    pub const fn with_rpl(self, rpl: u8) -> Self {
        Self(self.0 & !3 | (rpl & 3) as u16)
    }

    /// The error code that names it: without its RPL.
    pub const fn error_code(self) -> u32 {
        (self.0 & !3) as u32
    }
}

/// The first eight bytes of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Base address, the lower 32 bits.
    pub const fn base(self) -> u32 {
        (self.0 >> 16 & 0x00ff_ffff | self.0 >> 32 & 0xff00_0000) as u32
    }

    /// Limit in bytes, granularity applied.
    pub const fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attributes() & attributes::G != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }

    /// The access bytes, see [`attributes`].
    pub const fn attributes(self) -> u16 {
        (self.0 >> 40) as u16 & attributes::ALL
    }

    /// Type field.
    pub const fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 0xf
    }

    /// Whether it is a system segment or a gate.
    pub const fn is_system(self) -> bool {
        self.attributes() & attributes::S == 0
    }

    /// Whether it is a code segment.
    pub const fn is_code(self) -> bool {
        self.attributes() & (attributes::S | attributes::CODE) == attributes::S | attributes::CODE
    }

    /// Whether it is a data segment.
    pub const fn is_data(self) -> bool {
        self.attributes() & (attributes::S | attributes::CODE) == attributes::S
    }

    /// Whether it is a conforming code segment.
    pub const fn is_conforming(self) -> bool {
        self.is_code() && self.attributes() & attributes::DOWN_CONFORMING != 0
    }

    /// Whether data can be read through it.
    pub const fn is_readable(self) -> bool {
        self.is_data() || self.is_code() && self.attributes() & attributes::WRITABLE_READABLE != 0
    }

    /// Whether data can be written through it.
    pub const fn is_writable(self) -> bool {
        self.is_data() && self.attributes() & attributes::WRITABLE_READABLE != 0
    }

    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }

    /// Whether it is present.
    pub const fn is_present(self) -> bool {
        self.attributes() & attributes::P != 0
    }

    /// Whether it is 64-bit code.
    pub const fn is_long(self) -> bool {
        self.attributes() & attributes::L != 0
    }

    /// The D or B bit.
    pub const fn is_big(self) -> bool {
        self.attributes() & attributes::DB != 0
    }
}

/// A call, task, interrupt or trap gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// The first eight bytes.
    pub low: u64,
    /// The second eight bytes, of gates in long mode; else zero.
    pub high: u64,
}

impl Gate {
    /// Type, DPL and P, as of any descriptor.
    pub const fn descriptor(self) -> Descriptor {
        Descriptor(self.low)
    }

    /// The code segment, or the TSS of a task gate.
    pub const fn selector(self) -> Selector {
        Selector((self.low >> 16) as u16)
    }

    /// Offset in a 16-bit gate.
    pub const fn offset16(self) -> u64 {
        self.low & 0xffff
    }

    /// Offset in a 32-bit gate.
    pub const fn offset32(self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000
    }

    /// Offset in a 64-bit gate.
    pub const fn offset64(self) -> u64 {
        self.offset32() | self.high << 32
    }

    /// How many parameters a call gate copies.
    pub const fn parameters(self) -> u32 {
        (self.low >> 32) as u32 & 0x1f
    }

    /// Which stack of the interrupt stack table; 0 for none.
    pub const fn ist(self) -> u8 {
        (self.low >> 32) as u8 & 7
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_segment() {
        let d = Descriptor(0x00cf_9b00_0000_ffff);
        assert_eq!((d.base(), d.limit()), (0, 0xffff_ffff));
        assert!(d.is_code() && d.is_readable() && d.is_present() && d.is_big());
        assert!(!d.is_writable() && !d.is_conforming() && !d.is_long());
        assert_eq!(d.attributes(), 0xc09b);
    }

    #[test]
    fn base_is_scattered() {
        let d = Descriptor(0x1240_8956_789a_0067);
        assert_eq!(d.base(), 0x1256_789a);
        assert_eq!(d.limit(), 0x67);
        assert_eq!(d.kind(), system_type::TSS_AVAILABLE);
    }

    #[test]
    fn gate_fields() {
        let g = Gate {
            low: 0x1234_8e03_0008_5678,
            high: 0xffff_8000,
        };
        assert_eq!(g.selector(), Selector(8));
        assert_eq!(g.offset64(), 0xffff_8000_1234_5678);
        assert_eq!(g.ist(), 3);
    }
}
