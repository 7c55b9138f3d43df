//! Numbers of the MSRs that are the platform's (SDM 4; `Documentation/virt/kvm/x86/msr.rst`), and
//! the lists that KVM gives of them.

#![allow(missing_docs, reason = "the manuals' names")]

pub const P5_MC_ADDR: u32 = 0x0;
pub const P5_MC_TYPE: u32 = 0x1;
pub const PLATFORM_ID: u32 = 0x17;
pub const EBL_CR_POWERON: u32 = 0x2a;
pub const EBC_FREQUENCY_ID: u32 = 0x2c;
pub const UCODE_WRITE: u32 = 0x79;
pub const UCODE_REV: u32 = 0x8b;
pub const FSB_FREQUENCY: u32 = 0xcd;
pub const PLATFORM_INFO: u32 = 0xce;
pub const MTRR_CAP: u32 = 0xfe;
pub const ARCH_CAPABILITIES: u32 = 0x10a;
pub const FLUSH_CMD: u32 = 0x10b;
pub const BBL_CR_CTL3: u32 = 0x11e;
pub const MISC_FEATURES_ENABLES: u32 = 0x140;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17a;
pub const MCG_CTL: u32 = 0x17b;
pub const PERF_STATUS: u32 = 0x198;
pub const PERF_CTL: u32 = 0x199;
pub const LAST_BRANCH_FROM: u32 = 0x1db;
pub const LAST_INT_TO: u32 = 0x1de;
pub const POWER_CTL: u32 = 0x1fc;
pub const MTRR_PHYS_BASE0: u32 = 0x200;
pub const MTRR_PHYS_LAST: u32 = 0x20f;
pub const MTRR_FIX64K: u32 = 0x250;
pub const MTRR_FIX16K_LAST: u32 = 0x259;
pub const MTRR_FIX16K: u32 = 0x258;
pub const MTRR_FIX4K: u32 = 0x268;
pub const MTRR_FIX4K_LAST: u32 = 0x26f;
pub const MC0_CTL2: u32 = 0x280;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const PERF_CAPABILITIES: u32 = 0x345;
pub const MC0_CTL: u32 = 0x400;
pub const RAPL_POWER_UNIT: u32 = 0x606;
pub const PKG_ENERGY: u32 = 0x611;
pub const DRAM_ENERGY: u32 = 0x619;
pub const PP0_ENERGY: u32 = 0x639;
pub const PP1_ENERGY: u32 = 0x641;
pub const X2APIC: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8ff;
pub const K7_EVNTSEL0: u32 = 0xc001_0000;
pub const K7_PERFCTR3: u32 = 0xc001_0007;
pub const SYSCFG: u32 = 0xc001_0010;
pub const HWCR: u32 = 0xc001_0015;
pub const K7_CLK_CTL: u32 = 0xc001_001b;
pub const NB_CFG: u32 = 0xc001_001f;
pub const PATCH_LOADER: u32 = 0xc001_0020;
pub const INT_PENDING: u32 = 0xc001_0055;
pub const MMIO_CONF_BASE: u32 = 0xc001_0058;
pub const TSEG_ADDR: u32 = 0xc001_0112;
pub const TSEG_MASK: u32 = 0xc001_0113;
pub const VM_HSAVE_PA: u32 = 0xc001_0117;
pub const OSVW_LENGTH: u32 = 0xc001_0140;
pub const OSVW_STATUS: u32 = 0xc001_0141;
pub const DC_CFG: u32 = 0xc001_1022;
pub const TW_CFG: u32 = 0xc001_1023;
pub const DE_CFG: u32 = 0xc001_1029;
pub const BU_CFG2: u32 = 0xc001_102a;
pub const F15H_EX_CFG: u32 = 0xc001_102c;

pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
pub const KVM_ASYNC_PF: u32 = 0x4b56_4d02;
pub const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
pub const KVM_ASYNC_PF_ACK: u32 = 0x4b56_4d07;
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
pub const KVM_PV_EOI: u32 = 0x4b56_4d04;
pub const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;

use x86::msr as cpu;

/// `KVM_GET_MSR_INDEX_LIST`: what a monitor must save and restore.
pub const SAVED: &[u32] = &[
    cpu::SYSENTER_CS,
    cpu::SYSENTER_ESP,
    cpu::SYSENTER_EIP,
    cpu::STAR,
    cpu::CSTAR,
    cpu::KERNEL_GS_BASE,
    cpu::SFMASK,
    cpu::LSTAR,
    cpu::TSC,
    cpu::PAT,
    cpu::TSC_AUX,
    cpu::SPEC_CTRL,
    KVM_SYSTEM_TIME,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME_NEW,
    KVM_WALL_CLOCK_NEW,
    KVM_ASYNC_PF,
    KVM_ASYNC_PF_INT,
    KVM_ASYNC_PF_ACK,
    KVM_STEAL_TIME,
    KVM_PV_EOI,
    cpu::TSC_ADJUST,
    cpu::TSC_DEADLINE,
    ARCH_CAPABILITIES,
    cpu::MISC_ENABLE,
    MCG_STATUS,
    MCG_CTL,
    PLATFORM_INFO,
    MISC_FEATURES_ENABLES,
    POWER_CTL,
    UCODE_REV,
    HWCR,
    KVM_POLL_CONTROL,
];

/// `KVM_GET_MSR_FEATURE_INDEX_LIST`: what describes the CPU, readable without a vCPU.
pub const FEATURES: &[u32] = &[DE_CFG, UCODE_REV, ARCH_CAPABILITIES, PERF_CAPABILITIES];

/// The value of a feature MSR.
pub fn feature(index: u32) -> Option<u64> {
    match index {
        // LFENCE serialises.
        DE_CFG => Some(1 << 1),
        UCODE_REV => Some(DEFAULT_UCODE_REV),
        ARCH_CAPABILITIES => Some(crate::cpuid::ARCH_CAPABILITIES),
        // No performance counters.
        PERF_CAPABILITIES => Some(0),
        _ => None,
    }
}

/// A microcode revision that guests take for a recent one.
pub const DEFAULT_UCODE_REV: u64 = 0x0100_0065;
