//! A platform on which nothing happens: no interrupts, no devices.

use addr::Gpa;
use cpu::{CpuState, CpuidResult, Exception, Handled, Platform, Refusal};

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

/// `#GP(0)`.
const GENERAL_PROTECTION: Refusal = Refusal::Exception(Exception {
    vector: 13,
    error_code: Some(0),
    payload: None,
});

impl Platform for Quiet {
    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn interrupt_window_requested(&self) -> bool {
        false
    }

    fn halt(&mut self, _state: &mut CpuState) -> Handled {
        Handled::No
    }

    fn cpuid(&mut self, _state: &CpuState, _leaf: u32, _subleaf: u32) -> CpuidResult {
        CpuidResult::default()
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

    fn mmio_read(&mut self, _gpa: Gpa, _data: &mut [u8]) -> Handled {
        Handled::No
    }

    fn mmio_write(&mut self, _gpa: Gpa, _data: &[u8]) -> Handled {
        Handled::No
    }

    fn port_read(&mut self, _port: u16, _data: &mut [u8]) -> Handled {
        Handled::No
    }

    fn port_write(&mut self, _port: u16, _data: &[u8]) -> Handled {
        Handled::No
    }

    fn hypercall(&mut self, _state: &mut CpuState) -> Result<u64, Refusal> {
        Err(GENERAL_PROTECTION)
    }
}
