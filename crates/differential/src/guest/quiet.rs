//! A platform on which nothing happens: no interrupts, no devices.

use cpu::{CpuState, CpuidResult, Exception, Platform, Refusal};

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Quiet;

/// `#GP(0)`.
const GENERAL_PROTECTION: Refusal = Refusal::Exception(Exception {
    vector: 13,
    error_code: Some(0),
    payload: None,
});

/// The physical CPU's, with x87, SSE and AVX as the only extended state.
pub(super) fn host_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let host = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    let mut result = CpuidResult {
        eax: host.eax,
        ebx: host.ebx,
        ecx: host.ecx,
        edx: host.edx,
    };
    if (leaf, subleaf) == (0xd, 0) {
        (result.eax, result.edx) = (7, 0);
    }
    result
}

impl Platform for Quiet {
    fn cpuid(&mut self, _state: &CpuState, leaf: u32, subleaf: u32) -> CpuidResult {
        host_cpuid(leaf, subleaf)
    }

    fn read_msr(&mut self, _state: &CpuState, _index: u32) -> Result<u64, Refusal> {
        Err(GENERAL_PROTECTION)
    }

    fn write_msr(
        &mut self,
        _state: &mut CpuState,
        _index: u32,
        _value: u64,
    ) -> Result<(), Refusal> {
        Err(GENERAL_PROTECTION)
    }

    fn task_priority(&self) -> u8 {
        0
    }

    fn set_task_priority(&mut self, _priority: u8) {}

    fn hypercall(&mut self, _state: &mut CpuState) -> Result<u64, Refusal> {
        Err(GENERAL_PROTECTION)
    }
}
