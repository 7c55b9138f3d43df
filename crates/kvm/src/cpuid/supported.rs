//! `KVM_GET_SUPPORTED_CPUID` and `KVM_GET_EMULATED_CPUID`.

use core::arch::x86_64::{__cpuid_count, CpuidResult};

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features::{
    LEAF_1_ECX, LEAF_1_EDX, LEAF_7_EBX, LEAF_7_ECX, LEAF_7_EDX, LEAF_80000001_ECX,
    LEAF_80000001_EDX, LEAF_80000001_EDX_INTEL, LEAF_80000008_EBX, LEAF_80000021_EAX, LEAF_D_1_EAX,
    XCR0,
};
use super::words;

/// Highest basic leaf.
const MAX_BASIC: u32 = 0x1f;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_0021;
/// KVM's paravirtual leaves: the signature, then the features.
const SIGNATURE: u32 = 0x4000_0000;
const FEATURES: u32 = 0x4000_0001;

/// KVM's paravirtual features (`Documentation/virt/kvm/x86/cpuid.rst`): both clocks, no delay for
/// port accesses, asynchronous page faults (with an interrupt for those that are ready), steal time,
/// ends of interrupts without an exit, unhalt, IPIs and yields by hypercall, halt polling, and a clock that is stable across vCPUs.
const PARAVIRTUAL: u32 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 11
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 24;

/// MAXPHYADDR of a guest.
const PHYSICAL_BITS: u32 = 46;

fn host(function: u32, index: u32) -> CpuidResult {
    __cpuid_count(function, index)
}

fn host_is_amd() -> bool {
    let leaf = host(0, 0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx];
    name == words(b"AuthenticAMD") || name == words(b"HygonGenuine")
}

/// Offset and size of an extended component of the XSAVE area; AVX is the only one.
fn component(index: u32) -> Option<(u32, u32)> {
    (index == 2).then_some((576, 256))
}

/// Size of the XSAVE area in the standard format for these components.
pub(super) fn standard_size(xcr0: u64) -> u32 {
    let ends = (2..64)
        .filter(|i| xcr0 >> i & 1 != 0)
        .filter_map(component)
        .map(|(offset, size)| offset + size);
    ends.max().unwrap_or(576)
}

/// Size of the XSAVE area in the compacted format for these components.
pub(super) fn compacted_size(xcr0: u64) -> u32 {
    let sizes = (2..64)
        .filter(|i| xcr0 >> i & 1 != 0)
        .filter_map(component)
        .map(|(_, size)| size);
    576 + sizes.sum::<u32>()
}

/// The table that `KVM_GET_SUPPORTED_CPUID` gives.
pub fn supported() -> Vec<kvm_cpuid_entry2> {
    let max_basic = host(0, 0).eax.min(MAX_BASIC);
    let max_extended = if host_is_amd() {
        MAX_EXTENDED
    } else {
        host(0x8000_0000, 0).eax.min(0x8000_0008)
    };
    let mut table = Vec::new();
    for function in 0..=max_basic {
        basic(&mut table, function, max_basic);
    }
    for function in 0x8000_0000..=max_extended {
        extended(&mut table, function, max_extended);
    }
    paravirtual(&mut table);
    table
}

/// The table that `KVM_GET_EMULATED_CPUID` gives: what is there though the host lacks it.
pub fn emulated() -> Vec<kvm_cpuid_entry2> {
    let mut table = Vec::new();
    let mut add = |function, flags, answer| table.push(entry(function, 0, flags, answer));
    add(0, 0, answer(7, 0, 0, 0));
    for function in 1..=7 {
        let (flags, words) = match function {
            1 => (0, answer(0, 0, 1 << 21, 0)),
            7 => (
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                answer(0, 0, LEAF_7_ECX.own, 0),
            ),
            _ => continue,
        };
        add(function, flags, words);
    }
    table
}

fn answer(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidResult {
    CpuidResult { eax, ebx, ecx, edx }
}

fn entry(function: u32, index: u32, flags: u32, words: CpuidResult) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax: words.eax,
        ebx: words.ebx,
        ecx: words.ecx,
        edx: words.edx,
        ..Default::default()
    }
}

fn plain(table: &mut Vec<kvm_cpuid_entry2>, function: u32, words: CpuidResult) {
    table.push(entry(function, 0, 0, words));
}

fn indexed(table: &mut Vec<kvm_cpuid_entry2>, function: u32, index: u32, words: CpuidResult) {
    table.push(entry(
        function,
        index,
        KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        words,
    ));
}

fn basic(table: &mut Vec<kvm_cpuid_entry2>, function: u32, max: u32) {
    let leaf = host(function, 0);
    match function {
        0 => plain(table, 0, answer(max, leaf.ebx, leaf.ecx, leaf.edx)),
        1 => plain(table, 1, version(leaf)),
        2 => plain(table, 2, leaf),
        4 => caches(table, 4),
        6 => plain(table, 6, answer(4, 0, 0, 0)),
        7 => structured(table, leaf),
        0xb | 0x1f => indexed(table, function, 0, answer(0, 0, 0, 0)),
        0xd => extended_state(table),
        _ => plain(table, function, answer(0, 0, 0, 0)),
    }
}

/// Version and features. EBX keeps the size of a cache line; the APIC id is the monitor's to set.
fn version(leaf: CpuidResult) -> CpuidResult {
    answer(
        leaf.eax,
        leaf.ebx & 0xff00,
        LEAF_1_ECX.of(leaf.ecx),
        LEAF_1_EDX.of(leaf.edx),
    )
}

fn structured(table: &mut Vec<kvm_cpuid_entry2>, leaf: CpuidResult) {
    let words = answer(
        0,
        LEAF_7_EBX.of(leaf.ebx),
        LEAF_7_ECX.of(leaf.ecx),
        LEAF_7_EDX.of(leaf.edx),
    );
    indexed(table, 7, 0, words);
}

/// Cache parameters, as the host has them, up to the first that is none.
fn caches(table: &mut Vec<kvm_cpuid_entry2>, function: u32) {
    for index in 0.. {
        let leaf = host(function, index);
        indexed(table, function, index, leaf);
        if leaf.eax.is_multiple_of(0x20) || index == 15 {
            break;
        }
    }
}

fn extended_state(table: &mut Vec<kvm_cpuid_entry2>) {
    let size = standard_size(XCR0);
    indexed(table, 0xd, 0, answer(XCR0 as u32, size, size, 0));
    indexed(
        table,
        0xd,
        1,
        answer(LEAF_D_1_EAX, compacted_size(XCR0), 0, 0),
    );
    let (offset, size) = component(2).expect("AVX is a component");
    indexed(table, 0xd, 2, answer(size, offset, 0, 0));
}

fn extended(table: &mut Vec<kvm_cpuid_entry2>, function: u32, max: u32) {
    let there = function <= host(0x8000_0000, 0).eax;
    let leaf = if there {
        host(function, 0)
    } else {
        answer(0, 0, 0, 0)
    };
    match function {
        0x8000_0000 => plain(table, function, answer(max, leaf.ebx, leaf.ecx, leaf.edx)),
        0x8000_0001 => plain(table, function, extended_features(leaf)),
        0x8000_0002..=0x8000_0006 => plain(table, function, leaf),
        // Invariant TSC.
        0x8000_0007 => plain(table, function, answer(0, 0, 0, leaf.edx & 1 << 8)),
        0x8000_0008 => plain(table, function, address_sizes(leaf)),
        0x8000_001d => caches(table, function),
        0x8000_0021 => plain(table, function, answer(LEAF_80000021_EAX, 0, 0b1110, 0)),
        _ => plain(table, function, answer(0, 0, 0, 0)),
    }
}

fn extended_features(leaf: CpuidResult) -> CpuidResult {
    let mut edx = LEAF_80000001_EDX.of(leaf.edx);
    if !host_is_amd() {
        edx &= LEAF_80000001_EDX_INTEL;
    }
    answer(
        leaf.eax,
        leaf.ebx & 0xf000_ffff,
        LEAF_80000001_ECX.of(leaf.ecx),
        edx,
    )
}

/// 48 bits of linear address; MAXPHYADDR is ours.
fn address_sizes(leaf: CpuidResult) -> CpuidResult {
    answer(
        PHYSICAL_BITS | 48 << 8,
        LEAF_80000008_EBX.of(leaf.ebx),
        0,
        0,
    )
}

fn paravirtual(table: &mut Vec<kvm_cpuid_entry2>) {
    let [ebx, ecx, edx] = words(b"KVMKVMKVM\0\0\0");
    plain(table, SIGNATURE, answer(FEATURES, ebx, ecx, edx));
    plain(table, FEATURES, answer(PARAVIRTUAL, 0, 0, 0));
}
