//! What the guest's CPUID offers, as masks of register bits.

/// Which bits of the CPU's registers exist for this guest.
///
/// Derived from the guest's CPUID whenever that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bits of CR4 that can be set.
    pub cr4: u64,
    /// Bits of EFER that can be set.
    pub efer: u64,
    /// Bits of XCR0 that can be set.
    pub xcr0: u64,
    /// Width of a physical address.
    pub physical_bits: u32,
}
