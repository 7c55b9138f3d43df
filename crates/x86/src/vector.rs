//! Vectors of the architecture's own exceptions (SDM 3A, table 7-1).

/// Divide error.
pub const DE: u8 = 0;
/// Debug.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint, `INT3`.
pub const BP: u8 = 3;
/// Overflow, `INTO`.
pub const OF: u8 = 4;
/// `BOUND` range exceeded.
pub const BR: u8 = 5;
/// Invalid opcode.
pub const UD: u8 = 6;
/// Device not available.
pub const NM: u8 = 7;
/// Double fault.
pub const DF: u8 = 8;
/// Invalid TSS.
pub const TS: u8 = 10;
/// Segment not present.
pub const NP: u8 = 11;
/// Stack fault.
pub const SS: u8 = 12;
/// General protection.
pub const GP: u8 = 13;
/// Page fault.
pub const PF: u8 = 14;
/// x87 floating-point error.
pub const MF: u8 = 16;
/// Alignment check.
pub const AC: u8 = 17;
/// Machine check.
pub const MC: u8 = 18;
/// SIMD floating-point exception.
pub const XM: u8 = 19;
/// Virtualisation exception.
pub const VE: u8 = 20;
/// Control protection.
pub const CP: u8 = 21;

/// How an exception combines with another one that comes up while it is being delivered (SDM 3A,
/// table 7-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The two are handled one after the other.
    Benign,
    /// Two of these make a double fault.
    Contributory,
    /// A page fault: followed by one of its own kind or a contributory one it makes a double fault.
    PageFault,
    /// A double fault: anything but a benign one on top is a triple fault.
    DoubleFault,
}

/// The class of the exception with this vector.
pub const fn class(vector: u8) -> Class {
    match vector {
        DE | TS | NP | SS | GP | CP => Class::Contributory,
        PF | VE => Class::PageFault,
        DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Whether the exception with this vector pushes an error code.
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, DF | TS | NP | SS | GP | PF | AC | CP)
}
