//! What the CPU needs from the machine around it.

use addr::Gpa;

use crate::{CpuState, Exception, Exit};

/// The answers to `CPUID`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Whether somebody below the monitor took an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// Done, the guest goes on.
    Yes,
    /// It leaves for the monitor.
    No,
}

/// How a call of the platform can fail to give an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The guest gets this exception.
    Exception(Exception),
    /// The monitor must decide; the instruction runs again, or is completed, on re-entry.
    Exit(Exit),
}

/// What the other vendor's hypercall instruction does (KVM hides which CPU it runs on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallInstruction {
    /// It is a hypercall.
    Works,
    /// It is a hypercall, and these bytes take its place in the guest's memory.
    Rewritten([u8; 3]),
    /// `#UD`.
    Undefined,
}

/// Which instructions reach device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceInstructions {
    /// All.
    All,
    /// Not those of the x87 and of AVX, which KVM's own emulator does not know.
    Emulated,
}

/// The machine around one CPU: interrupt controller, MSRs, CPUID, devices "in the kernel".
///
/// All methods are called in the vCPU's own thread. None may call back into the vCPU. The defaults are
/// those of a machine in which nothing happens: no interrupts, and all devices are the monitor's.
pub trait Platform {
    /// Whether a maskable interrupt waits for this CPU. Asked after a kick and when interrupts
    /// become enabled.
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    /// Takes the interrupt that is to be delivered now (the acknowledge cycle).
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    /// Whether the monitor wants [`Exit::InterruptWindow`].
    fn interrupt_window_requested(&self) -> bool {
        false
    }
    /// `HLT`: yes, and this call waited until there is something to do; or no, the monitor waits.
    fn halt(&mut self, state: &mut CpuState) -> Handled {
        let _ = state;
        Handled::No
    }
    /// `CPUID`.
    fn cpuid(&mut self, state: &CpuState, leaf: u32, subleaf: u32) -> CpuidResult;
    /// Whether the guest may reach an MSR at all, the CPU's own included; `write` is the value of a
    /// `WRMSR`. The default has no filter.
    fn filter_msr(&mut self, index: u32, write: Option<u64>) -> Result<(), Refusal> {
        let _ = (index, write);
        Ok(())
    }
    /// `RDMSR` of a register that is not in [`crate::CpuMsrs`].
    fn read_msr(&mut self, state: &CpuState, index: u32) -> Result<u64, Refusal>;
    /// `WRMSR` of a register that is not in [`crate::CpuMsrs`].
    fn write_msr(&mut self, state: &mut CpuState, index: u32, value: u64) -> Result<(), Refusal>;
    /// The task priority (CR8), 0 to 15.
    fn task_priority(&self) -> u8;
    /// `MOV CR8`.
    fn set_task_priority(&mut self, priority: u8);
    /// A read of a guest physical address outside all slots.
    fn mmio_read(&mut self, gpa: Gpa, data: &mut [u8]) -> Handled {
        let _ = (gpa, data);
        Handled::No
    }
    /// A write to a guest physical address outside all slots.
    fn mmio_write(&mut self, gpa: Gpa, data: &[u8]) -> Handled {
        let _ = (gpa, data);
        Handled::No
    }
    /// `IN`.
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Handled {
        let _ = (port, data);
        Handled::No
    }
    /// `OUT`.
    fn port_write(&mut self, port: u16, data: &[u8]) -> Handled {
        let _ = (port, data);
        Handled::No
    }
    /// `VMCALL`/`VMMCALL`: the value for RAX, or a refusal.
    fn hypercall(&mut self, state: &mut CpuState) -> Result<u64, Refusal>;
    /// What an instruction of these bytes, `VMCALL`'s or `VMMCALL`'s, does.
    fn hypercall_instruction(&self, _bytes: [u8; 3]) -> HypercallInstruction {
        HypercallInstruction::Works
    }
    /// Whether `MONITOR` and `MWAIT` are there; they are `#UD` where not. The default is what CPUID
    /// says.
    fn offers_monitor(&mut self, state: &CpuState) -> bool {
        self.cpuid(state, 1, 0).ecx & 1 << 3 != 0
    }
    /// Which instructions reach device memory; others leave as ones that can't be run.
    fn device_instructions(&self) -> DeviceInstructions {
        DeviceInstructions::All
    }
}
