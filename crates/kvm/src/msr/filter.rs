//! `KVM_X86_SET_MSR_FILTER`: which MSRs a guest may reach.

use kvm_bindings::{
    KVM_MSR_FILTER_DEFAULT_DENY, KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_RANGE_VALID_MASK,
    KVM_MSR_FILTER_READ, KVM_MSR_FILTER_VALID_MASK, KVM_MSR_FILTER_WRITE, kvm_msr_filter,
    kvm_msr_filter_range,
};

use super::index::{X2APIC, X2APIC_LAST};
use crate::argument::Argument;
use crate::errno::Errno;

/// Reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Access {
    Read,
    Write,
}

#[derive(Clone, Debug)]
struct Range {
    flags: u32,
    base: u32,
    count: u32,
    bitmap: Vec<u64>,
}

impl Range {
    fn decides(&self, index: u32, flag: u32) -> Option<bool> {
        let offset = index.checked_sub(self.base)?;
        if offset >= self.count || self.flags & flag == 0 {
            return None;
        }
        let word = self.bitmap[offset as usize / 64];
        Some(word >> (offset % 64) & 1 != 0)
    }
}

/// The filter of a VM.
#[derive(Clone, Debug, Default)]
pub struct MsrFilter {
    deny_others: bool,
    ranges: Vec<Range>,
}

impl MsrFilter {
    /// Takes the structure and the bitmaps that it points to.
    pub fn new(filter: &kvm_msr_filter) -> Result<Self, Errno> {
        let deny_others = filter.flags & KVM_MSR_FILTER_DEFAULT_DENY != 0;
        let empty = filter.ranges.iter().all(|range| range.nmsrs == 0);
        if filter.flags & !KVM_MSR_FILTER_VALID_MASK != 0 || empty && deny_others {
            return Err(Errno::EINVAL);
        }
        let used = filter.ranges.iter().filter(|range| range.nmsrs != 0);
        let ranges = used.map(range).collect::<Result<_, _>>()?;
        Ok(Self {
            deny_others,
            ranges,
        })
    }

    /// Whether the guest may. The first range that has the register decides; x2APIC registers are
    /// never filtered.
    pub fn allows(&self, index: u32, access: Access) -> bool {
        if (X2APIC..=X2APIC_LAST).contains(&index) {
            return true;
        }
        let flag = match access {
            Access::Read => KVM_MSR_FILTER_READ,
            Access::Write => KVM_MSR_FILTER_WRITE,
        };
        let decided = self.ranges.iter().find_map(|r| r.decides(index, flag));
        decided.unwrap_or(!self.deny_others)
    }
}

fn range(given: &kvm_msr_filter_range) -> Result<Range, Errno> {
    let words = given.nmsrs.div_ceil(64) as usize;
    if given.flags & !KVM_MSR_FILTER_RANGE_VALID_MASK != 0
        || given.flags == 0
        || words * 8 > KVM_MSR_FILTER_MAX_BITMAP_SIZE as usize
    {
        return Err(Errno::EINVAL);
    }
    Ok(Range {
        flags: given.flags,
        base: given.base,
        count: given.nmsrs,
        bitmap: Argument::new(given.bitmap as u64).read_slice(words)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(flags: u32, range: kvm_msr_filter_range) -> kvm_msr_filter {
        let mut filter = kvm_msr_filter {
            flags,
            ..Default::default()
        };
        filter.ranges[0] = range;
        filter
    }

    #[test]
    fn the_bitmap_decides_inside_its_range() {
        let mut bitmap = [0b10u64];
        let range = kvm_msr_filter_range {
            flags: KVM_MSR_FILTER_READ,
            nmsrs: 2,
            base: 0x174,
            bitmap: bitmap.as_mut_ptr().cast(),
        };
        let filter = MsrFilter::new(&filter(0, range)).unwrap();
        assert!(!filter.allows(0x174, Access::Read));
        assert!(filter.allows(0x174, Access::Write));
        assert!(filter.allows(0x175, Access::Read));
        assert!(filter.allows(0x176, Access::Read));
    }

    #[test]
    fn bad_filters_are_refused() {
        let deny_all = filter(KVM_MSR_FILTER_DEFAULT_DENY, kvm_msr_filter_range::default());
        assert_eq!(MsrFilter::new(&deny_all).unwrap_err(), Errno::EINVAL);
        let range = |flags, nmsrs| kvm_msr_filter_range {
            flags,
            nmsrs,
            base: 0,
            bitmap: std::ptr::null_mut(),
        };
        for (flags, nmsrs, errno) in [
            (0, 1, Errno::EINVAL),
            (4, 1, Errno::EINVAL),
            (1, 0x4000, Errno::EINVAL),
            (1, 1, Errno::EFAULT),
        ] {
            let answer = MsrFilter::new(&filter(0, range(flags, nmsrs)));
            assert_eq!(answer.unwrap_err(), errno, "{flags} {nmsrs}");
        }
    }
}
