//! Model-specific registers as KVM shows them to a guest and to its monitor
//! (`kvm_get_msr_common` and `kvm_set_msr_common` in `arch/x86/kvm/x86.c`).
//!
//! Those whose effect is the CPU's own ([`cpu::CpuMsrs`]) come here only from the monitor; a guest's
//! access to them never leaves the CPU. The rest lives in `Msrs`, in the local APIC, or in the VM.

pub mod filter;
pub mod index;
pub(crate) mod mce;
mod mtrr;
mod own;
mod paravirtual;

use cpu::CpuState;
use kvm_bindings::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN,
};
use x86::msr as cpu_msr;

use crate::cpuid::{ARCH_CAPABILITIES, Bit};
use crate::irqchip::apic::BaseWriter;
use crate::vcpu::{Machine, Vcpu};
use index as n;
use mce::Banks;
use mtrr::Mtrrs;

/// Who reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The guest, by `RDMSR` and `WRMSR`.
    Guest,
    /// The monitor, by `KVM_GET_MSRS` and `KVM_SET_MSRS`.
    Monitor,
}

/// Why an access fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The register is there, but not this access or value.
    Invalid,
    /// There is no such register.
    Unknown,
    /// The filter forbids it.
    Filtered,
}

impl Refused {
    /// `KVM_MSR_EXIT_REASON_*`.
    pub fn reason(self) -> u32 {
        match self {
            Refused::Invalid => KVM_MSR_EXIT_REASON_INVAL,
            Refused::Unknown => KVM_MSR_EXIT_REASON_UNKNOWN,
            Refused::Filtered => KVM_MSR_EXIT_REASON_FILTER,
        }
    }
}

/// `IA32_MISC_ENABLE` at reset: no branch trace store, no precise sampling.
const MISC_ENABLE_RESET: u64 = 1 << 11 | 1 << 12;
const MISC_ENABLE_PMU_READ_ONLY: u64 = MISC_ENABLE_RESET | 1 << 7;
/// `IA32_MISC_ENABLE`: performance monitoring, kept as it is.
const MISC_ENABLE_EMON: u64 = 1 << 7;
/// `IA32_MISC_ENABLE`: `MONITOR` and `MWAIT` are there.
const MISC_ENABLE_MWAIT: u64 = 1 << 18;
/// `IA32_PLATFORM_INFO`: CPUID faulting.
const CPUID_FAULT: u64 = 1 << 31;
/// HWCR: bits that are ignored; bits that can be set.
const HWCR_IGNORED: u64 = 0x148;
const HWCR_SETTABLE: u64 = 1 << 18 | 1 << 24;

/// The registers of one vCPU that are not the CPU's own.
#[derive(Clone, Debug)]
pub(crate) struct Msrs {
    microcode: u64,
    arch_capabilities: u64,
    misc_enable: u64,
    platform_info: u64,
    misc_features: u64,
    power_ctl: u64,
    hwcr: u64,
    spec_ctrl: u64,
    tsc_adjust: u64,
    osvw: [u64; 2],
    mtrrs: Mtrrs,
    pub(crate) mce: Banks,
    pub(crate) paravirtual: paravirtual::Registers,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            microcode: n::DEFAULT_UCODE_REV,
            arch_capabilities: ARCH_CAPABILITIES,
            misc_enable: MISC_ENABLE_RESET,
            platform_info: CPUID_FAULT,
            misc_features: 0,
            power_ctl: 0,
            hwcr: 0,
            spec_ctrl: 0,
            tsc_adjust: 0,
            osvw: [0; 2],
            mtrrs: Mtrrs::default(),
            mce: Banks::default(),
            paravirtual: paravirtual::Registers::default(),
        }
    }
}

impl Msrs {
    /// What `IA32_MISC_ENABLE` says of `MONITOR` and `MWAIT`.
    pub(crate) fn enables_mwait(&self) -> bool {
        self.misc_enable & MISC_ENABLE_MWAIT != 0
    }
}

/// Registers that exist so that old kernels find something, and read as 0.
fn reads_as_zero(index: u32) -> bool {
    matches!(
        index,
        n::PLATFORM_ID
            | n::EBL_CR_POWERON
            | n::LAST_BRANCH_FROM..=n::LAST_INT_TO
            | n::SYSCFG
            | n::TSEG_ADDR
            | n::TSEG_MASK
            | n::VM_HSAVE_PA
            | n::INT_PENDING
            | n::NB_CFG
            | n::MMIO_CONF_BASE
            | n::BU_CFG2
            | n::PERF_CTL
            | n::DC_CFG
            | n::TW_CFG
            | n::F15H_EX_CFG
            | n::RAPL_POWER_UNIT
            | n::PKG_ENERGY
            | n::DRAM_ENERGY
            | n::PP0_ENERGY
            | n::PP1_ENERGY
            | n::K7_EVNTSEL0..=n::K7_PERFCTR3
    )
}

/// Registers that take any value and forget it.
fn forgets(index: u32) -> bool {
    matches!(
        index,
        n::NB_CFG
            | n::UCODE_WRITE
            | n::VM_HSAVE_PA
            | n::PATCH_LOADER
            | n::BU_CFG2
            | n::DC_CFG
            | n::TW_CFG
            | n::F15H_EX_CFG
            | n::K7_CLK_CTL
            | n::BBL_CR_CTL3
            | n::K7_EVNTSEL0..=n::K7_PERFCTR3
    )
}

/// Refuses a guest that has not the feature.
fn need(machine: &Machine, feature: Bit, writer: Writer) -> Result<(), Refused> {
    if writer == Writer::Monitor || machine.cpuid.has(feature) {
        Ok(())
    } else {
        Err(Refused::Invalid)
    }
}

/// One vCPU's registers, to be read.
pub(crate) struct View<'a> {
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) state: &'a CpuState,
    pub(crate) machine: &'a Machine,
}

/// One vCPU's registers, to be written.
pub(crate) struct Bus<'a> {
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) state: &'a mut CpuState,
    pub(crate) machine: &'a mut Machine,
}

impl View<'_> {
    /// `RDMSR`.
    pub(crate) fn read(&self, index: u32, reader: Writer) -> Result<u64, Refused> {
        if let Some(value) = own::read(self.state, index) {
            return Ok(value);
        }
        let msrs = &self.machine.msrs;
        match index {
            _ if Banks::owns(index) => msrs.mce.read(index, reader),
            _ if Mtrrs::owns(index) => msrs.mtrrs.read(index),
            _ if paravirtual::owns(index) => paravirtual::read(self.machine, self.vcpu, index),
            cpu_msr::TSC | cpu_msr::TSC_ADJUST | cpu_msr::TSC_DEADLINE => Ok(self.read_time(index)),
            cpu_msr::APIC_BASE => Ok(self.vcpu.apic_base(self.machine)),
            n::X2APIC..=n::X2APIC_LAST => self.read_x2apic(index),
            _ => self.read_described(index, reader),
        }
    }

    fn read_time(&self, index: u32) -> u64 {
        match index {
            cpu_msr::TSC => self.vcpu.tsc().read(),
            cpu_msr::TSC_ADJUST => self.machine.msrs.tsc_adjust,
            _ => self.vcpu.lapic().map_or(0, |lapic| lapic.tsc_deadline()),
        }
    }

    fn read_x2apic(&self, index: u32) -> Result<u64, Refused> {
        let lapic = self.vcpu.lapic().ok_or(Refused::Invalid)?;
        lapic.read_msr(index).map_err(|_| Refused::Invalid)
    }

    /// Registers that describe the CPU.
    fn read_described(&self, index: u32, reader: Writer) -> Result<u64, Refused> {
        let machine = self.machine;
        let msrs = &machine.msrs;
        Ok(match index {
            n::UCODE_REV => msrs.microcode,
            n::ARCH_CAPABILITIES => {
                need(machine, Bit::ARCH_CAPABILITIES, reader)?;
                msrs.arch_capabilities
            }
            n::PERF_CAPABILITIES if reader == Writer::Monitor => 0,
            cpu_msr::SPEC_CTRL => {
                need(machine, Bit::SPEC_CTRL, reader)?;
                msrs.spec_ctrl
            }
            n::PLATFORM_INFO => {
                if reader == Writer::Guest && !self.vcpu.vm().reads_platform_info() {
                    return Err(Refused::Invalid);
                }
                msrs.platform_info
            }
            n::MISC_FEATURES_ENABLES => msrs.misc_features,
            cpu_msr::MISC_ENABLE => msrs.misc_enable,
            n::POWER_CTL => msrs.power_ctl,
            n::HWCR => msrs.hwcr,
            n::OSVW_LENGTH | n::OSVW_STATUS => {
                need(machine, Bit::OSVW, Writer::Guest)?;
                msrs.osvw[(index - n::OSVW_LENGTH) as usize]
            }
            // Values that keep kernels of old from dividing by zero.
            n::FSB_FREQUENCY => 3,
            n::EBC_FREQUENCY_ID => 1 << 24,
            n::PERF_STATUS => 0x3e8 | 4 << 40,
            n::K7_CLK_CTL => 0x2000_0000,
            n::BBL_CR_CTL3 => 0xbe70_2111,
            n::DE_CFG => 1 << 1,
            _ if reads_as_zero(index) => 0,
            _ => return Err(Refused::Unknown),
        })
    }
}

impl Bus<'_> {
    /// `WRMSR`.
    pub(crate) fn write(&mut self, index: u32, value: u64, writer: Writer) -> Result<(), Refused> {
        if own::owns(index) {
            return own::write(self.state, self.machine, index, value, writer);
        }
        let physical_bits = self.machine.cpuid.physical_bits();
        let msrs = &mut self.machine.msrs;
        match index {
            _ if Banks::owns(index) => msrs.mce.write(index, value, writer),
            _ if Mtrrs::owns(index) => msrs.mtrrs.write(index, value, physical_bits),
            _ if paravirtual::owns(index) => {
                paravirtual::write(self.machine, self.vcpu, index, value)
            }
            cpu_msr::TSC | cpu_msr::TSC_ADJUST | cpu_msr::TSC_DEADLINE => {
                self.write_time(index, value, writer);
                Ok(())
            }
            cpu_msr::APIC_BASE => self.write_apic_base(value, writer),
            n::X2APIC..=n::X2APIC_LAST => self.vcpu.write_x2apic(index, value),
            _ => self.write_described(index, value, writer),
        }
    }

    fn write_time(&mut self, index: u32, value: u64, writer: Writer) {
        let adjust = &mut self.machine.msrs.tsc_adjust;
        match (index, writer) {
            (cpu_msr::TSC, Writer::Monitor) => {
                self.state.tsc_offset = self.vcpu.synchronize_tsc(Some(value));
            }
            (cpu_msr::TSC, Writer::Guest) => {
                let offset = value.wrapping_sub(self.vcpu.tsc().scaled_host());
                *adjust = adjust.wrapping_add(offset.wrapping_sub(self.state.tsc_offset));
                self.state.tsc_offset = offset;
            }
            (cpu_msr::TSC_ADJUST, writer) => {
                if !self.machine.cpuid.has(Bit::TSC_ADJUST) {
                    return;
                }
                if writer == Writer::Guest {
                    let by = value.wrapping_sub(*adjust);
                    self.state.tsc_offset = self.state.tsc_offset.wrapping_add(by);
                }
                *adjust = value;
            }
            _ => {
                if let Some(lapic) = self.vcpu.lapic() {
                    lapic.set_tsc_deadline(value);
                }
            }
        }
        self.vcpu.publish_tsc(self.state.tsc_offset);
        self.machine.clock_stale = true;
    }

    fn write_apic_base(&mut self, value: u64, writer: Writer) -> Result<(), Refused> {
        let by = match writer {
            Writer::Guest => BaseWriter::Guest,
            Writer::Monitor => BaseWriter::Monitor,
        };
        self.vcpu
            .write_apic_base(self.machine, value, by)
            .map_err(|_| Refused::Invalid)
    }

    fn write_described(&mut self, index: u32, value: u64, writer: Writer) -> Result<(), Refused> {
        let by_monitor = writer == Writer::Monitor;
        let only_monitor = || by_monitor.then_some(()).ok_or(Refused::Invalid);
        let feature = match index {
            cpu_msr::SPEC_CTRL | cpu_msr::PRED_CMD => Some(Bit::SPEC_CTRL),
            n::OSVW_LENGTH | n::OSVW_STATUS => Some(Bit::OSVW),
            _ => None,
        };
        if let Some(feature) = feature {
            need(self.machine, feature, writer)?;
        }
        let msrs = &mut self.machine.msrs;
        match index {
            n::UCODE_REV if by_monitor => msrs.microcode = value,
            n::UCODE_REV => {}
            n::ARCH_CAPABILITIES => {
                only_monitor()?;
                msrs.arch_capabilities = value;
            }
            n::PERF_CAPABILITIES if by_monitor && value == 0 => {}
            // IBRS, STIBP, SSBD: kept. IBPB: nothing to do.
            cpu_msr::SPEC_CTRL if value & !0b111 == 0 => msrs.spec_ctrl = value,
            cpu_msr::PRED_CMD if value & !1 == 0 => {}
            n::PLATFORM_INFO => {
                let faulting = msrs.misc_features & 1 != 0;
                only_monitor()?;
                if value & CPUID_FAULT == 0 && faulting {
                    return Err(Refused::Invalid);
                }
                msrs.platform_info = value;
            }
            n::MISC_FEATURES_ENABLES => {
                let can_fault = msrs.platform_info & CPUID_FAULT != 0;
                if value & !1 != 0 || value & 1 != 0 && !can_fault {
                    return Err(Refused::Invalid);
                }
                msrs.misc_features = value;
            }
            cpu_msr::MISC_ENABLE => {
                let switched = (msrs.misc_enable ^ value) & MISC_ENABLE_MWAIT != 0;
                let heeded = self.vcpu.vm().irqchip().policy().heeds_mwait_switch();
                if switched && heeded && !self.machine.cpuid.has(Bit::SSE3) {
                    return Err(Refused::Invalid);
                }
                write_misc_enable(&mut self.machine.msrs.misc_enable, value, writer)?;
            }
            n::POWER_CTL => msrs.power_ctl = value,
            n::HWCR => {
                let value = value & !HWCR_IGNORED;
                if value & !HWCR_SETTABLE != 0 {
                    return Err(Refused::Invalid);
                }
                msrs.hwcr = value;
            }
            n::MMIO_CONF_BASE if value == 0 => {}
            n::OSVW_LENGTH | n::OSVW_STATUS => {
                msrs.osvw[(index - n::OSVW_LENGTH) as usize] = value;
            }
            n::DE_CFG if value & !2 == 0 => {}
            _ if forgets(index) => {}
            cpu_msr::SPEC_CTRL | cpu_msr::PRED_CMD | n::MMIO_CONF_BASE | n::DE_CFG => {
                return Err(Refused::Invalid);
            }
            _ => return Err(Refused::Unknown),
        }
        Ok(())
    }
}

fn write_misc_enable(register: &mut u64, value: u64, writer: Writer) -> Result<(), Refused> {
    if writer == Writer::Monitor {
        *register = value;
        return Ok(());
    }
    let read_only = MISC_ENABLE_PMU_READ_ONLY & !MISC_ENABLE_EMON;
    if (*register ^ value) & read_only != 0 {
        return Err(Refused::Invalid);
    }
    *register = value & !MISC_ENABLE_EMON | *register & MISC_ENABLE_EMON;
    Ok(())
}
