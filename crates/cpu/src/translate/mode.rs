//! What a translation depends on besides the bytes of the code.
//!
//! Two blocks from the same bytes are the same only where all of this is equal; it is part of the
//! key under which a block is found.

use crate::engine::frame::View;

/// How a data segment takes part in addresses outside of 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentClass {
    /// Base 0, limit 4 GiB, readable and writable: no part at all.
    Flat = 0,
    /// Expand-up, readable and writable: base and limit are read when the code runs.
    Based = 1,
    /// Anything else (unusable, expand-down, read-only, code): checked for every access in Rust.
    Checked = 2,
}

/// The default operand and address size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeSize {
    Bits16 = 0,
    Bits32 = 1,
    Bits64 = 2,
}

impl CodeSize {
    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// The mode of a translation, packed.
///
/// | bits | meaning |
/// |---|---|
/// | 0, 1 | [`CodeSize`] |
/// | 2 | SS.B: the stack pointer is ESP rather than SP |
/// | 3, 4 | [`View`] |
/// | 5 | x87 and MMX raise `#NM` |
/// | 6 | SSE raises `#UD` |
/// | 7 | AVX raises `#UD` |
/// | 8 | CR0.EM: x87 raises `#NM`, MMX and SSE `#UD` |
/// | 9 | a single step: one instruction, then a look at what else is to be done |
/// | 10 | operands go through bounce buffers |
/// | 11 | CR0.MP and TS: `WAIT` raises `#NM` |
/// | 12 | CR0.TS: SSE and AVX raise `#NM` |
/// | 13 | no check is shared by several accesses |
/// | 14 | CPL 1 or 2 |
/// | 15 | one instruction for each block |
/// | 16 to 27 | [`SegmentClass`] of ES, CS, SS, DS, FS, GS |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Mode(pub(crate) u32);

impl Mode {
    pub(crate) const STACK32: u32 = 1 << 2;
    pub(crate) const X87_NM: u32 = 1 << 5;
    pub(crate) const SSE_UD: u32 = 1 << 6;
    pub(crate) const AVX_UD: u32 = 1 << 7;
    pub(crate) const EM: u32 = 1 << 8;
    pub(crate) const STEP: u32 = 1 << 9;
    pub(crate) const BOUNCE: u32 = 1 << 10;
    pub(crate) const WAIT_NM: u32 = 1 << 11;
    pub(crate) const SSE_NM: u32 = 1 << 12;
    pub(crate) const UNSHARED: u32 = 1 << 13;
    pub(crate) const MIDDLE: u32 = 1 << 14;
    pub(crate) const SINGLE: u32 = 1 << 15;

    pub(crate) fn new(size: CodeSize, view: View) -> Self {
        Self(size as u32 | (view as u32) << 3)
    }

    pub(crate) fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }

    #[must_use]
    pub(crate) fn with(self, bits: u32) -> Self {
        Self(self.0 | bits)
    }

    #[must_use]
    pub(crate) fn with_segment(self, index: usize, class: SegmentClass) -> Self {
        Self(self.0 | (class as u32) << (16 + 2 * index))
    }

    pub(crate) fn code_size(self) -> CodeSize {
        match self.0 & 3 {
            0 => CodeSize::Bits16,
            1 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        }
    }

    pub(crate) fn is_64(self) -> bool {
        self.code_size() == CodeSize::Bits64
    }

    pub(crate) fn view(self) -> View {
        View::ALL[(self.0 >> 3 & 3) as usize]
    }

    /// The same mode with other rights.
    #[must_use]
    pub(crate) fn with_view(self, view: View) -> Self {
        Self(self.0 & !(3 << 3) | (view as u32) << 3)
    }

    /// Whether this is CPL 0, 64 bits wide, and nothing special.
    pub(crate) fn is_kernel64(self) -> bool {
        self.is_plain64() && self.view() != View::User && !self.has(Self::MIDDLE)
    }

    /// Whether this is CPL 3, 64 bits wide, and nothing special.
    pub(crate) fn is_user64(self) -> bool {
        self.is_plain64() && self.view() == View::User
    }

    fn is_plain64(self) -> bool {
        self.is_64() && !self.has(Self::STEP | Self::BOUNCE | Self::UNSHARED)
    }

    /// The class of a segment by its number in the encoding.
    pub(crate) fn segment(self, index: usize) -> SegmentClass {
        match self.0 >> (16 + 2 * index) & 3 {
            0 => SegmentClass::Flat,
            1 => SegmentClass::Based,
            _ => SegmentClass::Checked,
        }
    }

    /// Width of the stack pointer.
    pub(crate) fn stack_bits(self) -> u32 {
        match (self.is_64(), self.has(Self::STACK32)) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }
}
