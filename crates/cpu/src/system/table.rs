//! Descriptor tables (SDM 3A, 3.5.1 and 6.10).

use addr::Gva;
use x86::descriptor::{Descriptor, Gate, Selector, attributes};
use x86::vector;

use super::fault::naming;
use super::{Abort, Context, Privilege};
use crate::state::Segment;

impl Context<'_> {
    /// Where the descriptor of a selector lies, `len` bytes of it; `None` outside its table.
    fn descriptor_address(&self, selector: Selector, len: u64) -> Option<Gva> {
        let (base, limit) = if selector.is_local() {
            let ldt = &self.state.segments.ldtr;
            if ldt.unusable || ldt.selector & !3 == 0 {
                return None;
            }
            (ldt.base, u64::from(ldt.limit))
        } else {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        };
        let offset = u64::from(selector.offset());
        if offset + len - 1 > limit {
            return None;
        }
        let linear = base.wrapping_add(offset);
        Some(Gva::new(if self.state.is_long_active() {
            linear
        } else {
            linear & 0xffff_ffff
        }))
    }

    /// Reads eight bytes as the CPU itself.
    pub(super) fn read_system(&mut self, gva: Gva) -> Result<u64, Abort> {
        let mut bytes = [0; 8];
        self.memory.read(gva, &mut bytes, Privilege::Implicit)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a descriptor; `None` outside its table.
    pub(super) fn find_descriptor(
        &mut self,
        selector: Selector,
    ) -> Result<Option<Descriptor>, Abort> {
        match self.descriptor_address(selector, 8) {
            Some(gva) => Ok(Some(Descriptor(self.read_system(gva)?))),
            None => Ok(None),
        }
    }

    /// Reads a descriptor; outside its table it is the fault `vector` that names the selector.
    pub(super) fn read_descriptor(
        &mut self,
        selector: Selector,
        vector: u8,
    ) -> Result<Descriptor, Abort> {
        self.find_descriptor(selector)?
            .ok_or(naming(vector, selector))
    }

    /// Reads a descriptor of 16 bytes (system segments and call gates in long mode).
    pub(super) fn read_wide_descriptor(
        &mut self,
        selector: Selector,
        vector: u8,
    ) -> Result<Gate, Abort> {
        let gva = self
            .descriptor_address(selector, 16)
            .ok_or(naming(vector, selector))?;
        let mut bytes = [0; 16];
        self.memory.read(gva, &mut bytes, Privilege::Implicit)?;
        let raw = u128::from_le_bytes(bytes);
        Ok(Gate {
            low: raw as u64,
            high: (raw >> 64) as u64,
        })
    }

    /// Sets the accessed bit of a code or data descriptor, as the CPU does when it loads one.
    pub(super) fn mark_accessed(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
    ) -> Result<Descriptor, Abort> {
        let bit = u64::from(attributes::ACCESSED) << 40;
        if descriptor.0 & bit == 0 {
            self.change_descriptor(selector, descriptor, |raw| raw | bit)?;
        }
        Ok(Descriptor(descriptor.0 | bit))
    }

    /// Sets the busy bit of a TSS descriptor.
    pub(super) fn mark_busy(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
    ) -> Result<(), Abort> {
        self.change_descriptor(selector, descriptor, |raw| raw | BUSY)
    }

    /// Clears the busy bit of a TSS descriptor.
    pub(super) fn clear_busy(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
    ) -> Result<(), Abort> {
        self.change_descriptor(selector, descriptor, |raw| raw & !BUSY)
    }

    /// Changes one bit of a descriptor with locked cycles, whatever others write beside it.
    fn change_descriptor(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
        change: impl Fn(u64) -> u64,
    ) -> Result<(), Abort> {
        let Some(gva) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let mut current = descriptor.0;
        while !self
            .memory
            .compare_exchange(gva, current, change(current), Privilege::Implicit)?
        {
            current = self.read_system(gva)?;
        }
        Ok(())
    }

    /// The hidden part of a code or data segment, its accessed bit set.
    pub(super) fn load_descriptor(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
    ) -> Result<Segment, Abort> {
        let descriptor = self.mark_accessed(selector, descriptor)?;
        Ok(segment_of(selector, descriptor))
    }
}

/// The busy bit in a descriptor.
const BUSY: u64 = 2 << 40;

/// The segment register that a descriptor makes.
pub(super) fn segment_of(selector: Selector, descriptor: Descriptor) -> Segment {
    Segment {
        base: u64::from(descriptor.base()),
        limit: descriptor.limit(),
        selector: selector.0,
        attributes: descriptor.attributes(),
        unusable: false,
    }
}

/// A segment register of real or virtual-8086 mode: the base follows the selector, all else stays.
pub(super) fn load_real(segment: &mut Segment, selector: u16) {
    segment.selector = selector;
    segment.base = u64::from(selector) << 4;
    if segment.unusable {
        segment.unusable = false;
        segment.limit = 0xffff;
        segment.attributes = attributes::P | attributes::S | 3;
    }
}

/// A segment register as virtual-8086 mode has it.
pub(super) fn virtual8086_segment(selector: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        attributes: attributes::P | attributes::S | attributes::DPL | 3,
        unusable: false,
    }
}

/// Faults unless a descriptor is present: `#NP`, or `#SS` for a stack.
pub(super) fn require_present(
    selector: Selector,
    descriptor: Descriptor,
    vector: u8,
) -> Result<(), Abort> {
    debug_assert!(matches!(vector, vector::NP | vector::SS));
    if descriptor.is_present() {
        Ok(())
    } else {
        Err(naming(vector, selector))
    }
}
