//! Segment registers, ours and KVM's.

use cpu::{Segment, TableRegister};
use kvm_bindings::{kvm_dtable, kvm_segment};
use x86::descriptor::attributes as a;

fn flag(attributes: u16, bit: u16) -> u8 {
    u8::from(attributes & bit != 0)
}

/// As `KVM_GET_SREGS` shows it.
pub(crate) fn to_kvm(segment: &Segment) -> kvm_segment {
    let at = segment.attributes;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (at & a::TYPE) as u8,
        present: flag(at, a::P) & u8::from(!segment.unusable),
        dpl: ((at & a::DPL) >> a::DPL_SHIFT) as u8,
        db: flag(at, a::DB),
        s: flag(at, a::S),
        l: flag(at, a::L),
        g: flag(at, a::G),
        avl: flag(at, a::AVL),
        unusable: u8::from(segment.unusable),
        padding: 0,
    }
}

/// From what `KVM_SET_SREGS` gives. A segment that is not present is unusable.
pub(crate) fn from_kvm(segment: &kvm_segment) -> Segment {
    let bit = |value: u8, bit: u16| if value & 1 != 0 { bit } else { 0 };
    let attributes = u16::from(segment.type_) & a::TYPE
        | bit(segment.s, a::S)
        | (u16::from(segment.dpl) & 3) << a::DPL_SHIFT
        | bit(segment.present, a::P)
        | bit(segment.avl, a::AVL)
        | bit(segment.l, a::L)
        | bit(segment.db, a::DB)
        | bit(segment.g, a::G);
    Segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        attributes,
        unusable: segment.unusable & 1 != 0 || segment.present & 1 == 0,
    }
}

/// GDTR or IDTR as KVM shows it.
pub(crate) fn table_to_kvm(table: TableRegister) -> kvm_dtable {
    kvm_dtable {
        base: table.base,
        limit: table.limit,
        padding: [0; 3],
    }
}

/// GDTR or IDTR as KVM gives it.
pub(crate) fn table_from_kvm(table: &kvm_dtable) -> TableRegister {
    TableRegister {
        base: table.base,
        limit: table.limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_loses_nothing() {
        let code64 = kvm_segment {
            base: 0x1000,
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 0xb,
            present: 1,
            dpl: 3,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            avl: 1,
            ..Default::default()
        };
        assert_eq!(to_kvm(&from_kvm(&code64)), code64);
    }

    #[test]
    fn not_present_is_unusable() {
        let null = kvm_segment::default();
        assert!(from_kvm(&null).unusable);
        assert_eq!(to_kvm(&from_kvm(&null)).unusable, 1);
    }
}
