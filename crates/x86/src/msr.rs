//! Numbers of model-specific registers (SDM 4; APM 2, appendix A).

#![allow(missing_docs, reason = "the manuals' names")]

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const FEATURE_CONTROL: u32 = 0x3a;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const PAT: u32 = 0x277;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;

/// Whether a memory type may stand in a byte of `IA32_PAT`.
const fn pat_type_is_valid(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6 | 7)
}

/// Whether this value may be written to `IA32_PAT` (SDM 3A, 13.12.2).
pub const fn pat_is_valid(value: u64) -> bool {
    let bytes = value.to_le_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if !pat_type_is_valid(bytes[i]) {
            return false;
        }
        i += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pat_types() {
        assert!(pat_is_valid(0x0007_0406_0007_0406));
        assert!(!pat_is_valid(0x0007_0406_0007_0402));
        assert!(!pat_is_valid(0x0807_0406_0007_0406));
    }
}
