//! vCPUs before their first instruction: CPUID, registers, local APIC.

use accel::{Accelerator, Vcpu, Vm};
use kvm_bindings::{
    CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2,
    kvm_msr_entry, kvm_regs, kvm_segment,
};

use crate::{
    boot::Entry,
    error::{BuildError, Named},
    layout,
};

/// Makes `count` vCPUs; the first is ready to enter the kernel, the others wait for SIPI.
pub(crate) fn create(
    accelerator: &dyn Accelerator,
    vm: &dyn Vm,
    count: u8,
    entry: &Entry,
) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
    let supported = accelerator
        .supported_cpuid()
        .named("KVM_GET_SUPPORTED_CPUID")?;
    let deadline = accelerator.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm.create_vcpu(u64::from(index)).named("KVM_CREATE_VCPU")?;
        let cpuid = cpuid_of(&supported, index, count, deadline)?;
        vcpu.set_cpuid(&cpuid).named("KVM_SET_CPUID2")?;
        count_at_p0(&*vcpu);
        set_up_lapic(&*vcpu)?;
        vcpus.push(vcpu);
    }
    enter(&*vcpus[0], entry)?;
    Ok(vcpus)
}

/// CPUID of vCPU `index`: what the accelerator supports, with this vCPU's place in the topology
/// (one package, `count` cores, one thread each).
fn cpuid_of(supported: &CpuId, index: u8, count: u8, deadline: bool) -> Result<CpuId, BuildError> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|e| !matches!(e.function, 0xb | 0x1f))
        .collect();
    let most = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if most >= 0xb {
        entries.extend(topology(index, count));
    }
    for entry in &mut entries {
        place(entry, index, count, deadline);
    }
    CpuId::from_entries(&entries).map_err(|_| BuildError::Kvm {
        call: "KVM_SET_CPUID2",
        cause: accel::Errno::new(libc::E2BIG),
    })
}

/// Bits of an APIC ID that number the cores.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// Leaf 0xB: threads, cores, end.
fn topology(index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, kind: u32, bits: u32, threads: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: threads,
        ecx: kind << 8 | subleaf,
        edx: u32::from(index),
        ..Default::default()
    };
    [
        level(0, 1, 0, 1),
        level(1, 2, core_bits(count), u32::from(count)),
        level(2, 0, 0, 0),
    ]
}

fn place(entry: &mut kvm_cpuid_entry2, index: u8, count: u8, deadline: bool) {
    const HYPERTHREADING: u32 = 1 << 28;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    let (id, threads) = (u32::from(index), u32::from(count));
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | threads << 16 | id << 24;
            entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
            entry.edx &= !HYPERTHREADING;
            if count > 1 {
                entry.edx |= HYPERTHREADING;
            }
        }
        // Intel's caches and cores: cores in bits 26 to 31.
        4 => entry.eax = entry.eax & 0x03ff_ffff | (threads - 1) << 26,
        // AMD's number of cores and bits for it.
        0x8000_0008 => entry.ecx = core_bits(count) << 12 | (threads - 1),
        // AMD's APIC ID, core ID and node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Says that the TSC counts at P0's frequency, as firmware does on AMD's processors (HWCR, bit 24,
/// `TscFreqSel`); Linux complains where it doesn't. An accelerator that does not know the register
/// is none of which a guest would expect it.
fn count_at_p0(vcpu: &dyn Vcpu) {
    const HWCR: u32 = 0xc001_0015;
    const TSC_FREQ_SEL: u64 = 1 << 24;
    let register = kvm_msr_entry {
        index: HWCR,
        data: TSC_FREQ_SEL,
        ..Default::default()
    };
    if !matches!(vcpu.set_msrs(&[register]), Ok(1)) {
        tracing::debug!("the accelerator knows no HWCR");
    }
}

/// LINT0 takes the PIC's interrupts, LINT1 NMIs, as firmware leaves them.
fn set_up_lapic(vcpu: &dyn Vcpu) -> Result<(), BuildError> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const EXTERNAL: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic().named("KVM_GET_LAPIC")?;
    for (register, value) in [(LINT0, EXTERNAL), (LINT1, NMI)] {
        for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
            lapic.regs[register + i] = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).named("KVM_SET_LAPIC")
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

fn enter(vcpu: &dyn Vcpu, entry: &Entry) -> Result<(), BuildError> {
    let mut sregs = vcpu.get_sregs().named("KVM_GET_SREGS")?;
    sregs.gdt.base = layout::GDT.raw();
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    if let Entry::Long { .. } = entry {
        sregs.cr0 |= CR0_PG;
        sregs.cr4 = CR4_PAE;
        sregs.cr3 = layout::PAGE_TABLES.raw();
        sregs.efer = EFER_LME | EFER_LMA;
    }
    sregs.cs = code_segment(entry);
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        db: 1,
        l: 0,
        ..sregs.cs
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    vcpu.set_sregs(&sregs).named("KVM_SET_SREGS")?;
    vcpu.set_regs(&registers(entry)).named("KVM_SET_REGS")
}

fn code_segment(entry: &Entry) -> kvm_segment {
    let long = u8::from(matches!(entry, Entry::Long { .. }));
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 11,
        present: 1,
        dpl: 0,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    }
}

fn registers(entry: &Entry) -> kvm_regs {
    let reserved_one = 2;
    match *entry {
        Entry::Long { rip, zero_page } => kvm_regs {
            rflags: reserved_one,
            rip: rip.raw(),
            rsi: zero_page.raw(),
            ..Default::default()
        },
        Entry::Pvh { rip, start_info } => kvm_regs {
            rflags: reserved_one,
            rip: rip.raw(),
            rbx: start_info.raw(),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut entries = cpuid.as_slice().iter();
        *entries
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_vcpu_finds_its_own_place() {
        let of = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let supported = [of(0, 0xd), of(1, 0), of(0xb, 7), of(0x8000_0008, 0x30)];
        let supported = CpuId::from_entries(&supported).unwrap();
        let cpuid = cpuid_of(&supported, 3, 4, true).unwrap();
        assert_eq!(leaf(&cpuid, 1, 0).ebx, 3 << 24 | 4 << 16);
        assert_ne!(leaf(&cpuid, 1, 0).ecx & 1 << 24, 0, "TSC deadline");
        assert_eq!(leaf(&cpuid, 0xb, 1).eax, 2);
        assert_eq!(leaf(&cpuid, 0xb, 1).edx, 3);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 3);
    }
}
