//! The machine around the CPU while it runs: [`cpu::Platform`] on top of the VM's devices.

use addr::Gpa;
use cpu::{
    CpuState, CpuidResult, DeviceInstructions, Exception, Exit, Handled, HypercallExit,
    HypercallInstruction, MsrExit, Platform, Refusal,
};
use x86::control::{Cr4, Efer};
use x86::vector;

use super::{Machine, Vcpu};
use crate::cpuid::Mirrored;
use crate::irqchip::policy::ChipMode;
use crate::msr::filter::Access;
use crate::msr::{Bus, Refused, View, Writer};
use crate::paravirt::{self, Hypercall, Outcome, Width};

const APIC_ENABLE: u64 = 1 << 11;

/// One vCPU's machine, for one run.
pub(super) struct VcpuPlatform<'a> {
    pub(super) vcpu: &'a Vcpu,
    pub(super) machine: &'a mut Machine,
}

impl VcpuPlatform<'_> {
    /// A refused MSR access: an exit where the monitor asked for it, else `#GP`.
    fn refused(&self, index: u32, write: Option<u64>, refused: Refused) -> Refusal {
        let reason = refused.reason();
        if self.vcpu.vm().msr_exits() & reason != 0 {
            return Refusal::Exit(Exit::Msr(MsrExit {
                index,
                write,
                reason,
            }));
        }
        Refusal::Exception(Exception {
            vector: vector::GP,
            error_code: Some(0),
            payload: None,
        })
    }
}

fn cpl(state: &CpuState) -> u8 {
    use x86::descriptor::attributes as a;
    ((state.segments.ss.attributes & a::DPL) >> a::DPL_SHIFT) as u8
}

fn hypercall_width(state: &CpuState) -> Width {
    use x86::descriptor::attributes as a;
    let long = state.msrs.efer & Efer::LMA.bits() != 0;
    if long && state.segments.cs.attributes & a::L != 0 {
        Width::Long
    } else {
        Width::Short
    }
}

impl Platform for VcpuPlatform<'_> {
    fn interrupt_pending(&mut self) -> bool {
        self.vcpu.hear_apic(self.machine);
        let irqchip = self.vcpu.vm().irqchip();
        let pending = self
            .vcpu
            .lapic()
            .is_some_and(|lapic| irqchip.has_interrupt(lapic));
        self.vcpu.show_apic(self.machine);
        pending
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        let irqchip = self.vcpu.vm().irqchip();
        self.vcpu.hear_apic(self.machine);
        let vector = self
            .vcpu
            .lapic()
            .and_then(|lapic| irqchip.acknowledge(lapic));
        self.vcpu.show_apic(self.machine);
        if vector.is_some() {
            self.vcpu.counters().irq_injections.bump();
        }
        vector
    }

    fn interrupt_window_requested(&self) -> bool {
        self.vcpu.run_page().wants_interrupt_window() && self.vcpu.accepts_monitor_interrupt()
    }

    /// The run loop sleeps, outside of guest mode, so that nobody waits for a sleeper.
    fn halt(&mut self, _state: &mut CpuState) -> Handled {
        Handled::No
    }

    fn cpuid(&mut self, state: &CpuState, leaf: u32, subleaf: u32) -> CpuidResult {
        if matches!(leaf, 1 | 7 | 0xd) {
            let apic = self.vcpu.apic_base(self.machine) & APIC_ENABLE != 0;
            self.machine.cpuid.mirror(Mirrored {
                os_xsave: state.cr4 & Cr4::OSXSAVE.bits() != 0,
                os_pke: state.cr4 & Cr4::PKE.bits() != 0,
                apic,
                xcr0: state.xcr0,
                no_unhalt: self.vcpu.vm().halts_in_guest(),
                mwait: self.vcpu.mwait_switch(self.machine),
            });
        }
        self.machine.cpuid.query(leaf, subleaf)
    }

    fn filter_msr(&mut self, index: u32, write: Option<u64>) -> Result<(), Refusal> {
        let access = match write {
            Some(_) => Access::Write,
            None => Access::Read,
        };
        if self.vcpu.vm().allows_msr(index, access) {
            Ok(())
        } else {
            Err(self.refused(index, write, Refused::Filtered))
        }
    }

    fn read_msr(&mut self, state: &CpuState, index: u32) -> Result<u64, Refusal> {
        let view = View {
            vcpu: self.vcpu,
            state,
            machine: self.machine,
        };
        let value = view.read(index, Writer::Guest);
        value.map_err(|refused| self.refused(index, None, refused))
    }

    fn write_msr(&mut self, state: &mut CpuState, index: u32, value: u64) -> Result<(), Refusal> {
        let mut bus = Bus {
            vcpu: self.vcpu,
            state,
            machine: self.machine,
        };
        let written = bus.write(index, value, Writer::Guest);
        if self.machine.clock_stale {
            self.vcpu.refresh_clock(self.machine);
        }
        written.map_err(|refused| self.refused(index, Some(value), refused))
    }

    fn task_priority(&self) -> u8 {
        self.vcpu.task_priority(self.machine)
    }

    fn set_task_priority(&mut self, priority: u8) {
        let before = self.vcpu.task_priority(self.machine);
        self.vcpu.set_task_priority(self.machine, priority);
        if self.vcpu.lapic().is_none() && priority < before {
            self.machine.tpr_exit = true;
            self.vcpu.kicker().look();
        }
    }

    fn mmio_read(&mut self, gpa: Gpa, data: &mut [u8]) -> Handled {
        if self.vcpu.reports_tpr(self.machine, gpa, data.len()) {
            return Handled::No;
        }
        let lapic = self.vcpu.lapic().map(|lapic| &**lapic);
        self.vcpu.vm().irqchip().read_memory(lapic, gpa, data)
    }

    fn mmio_write(&mut self, gpa: Gpa, data: &[u8]) -> Handled {
        if self.vcpu.reports_tpr(self.machine, gpa, data.len()) {
            return Handled::No;
        }
        let lapic = self.vcpu.lapic().map(|lapic| &**lapic);
        self.vcpu.vm().irqchip().write_memory(lapic, gpa, data)
    }

    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Handled {
        self.vcpu.vm().irqchip().read_port(port, data)
    }

    fn port_write(&mut self, port: u16, data: &[u8]) -> Handled {
        self.vcpu.vm().irqchip().write_port(port, data)
    }

    fn hypercall_instruction(&self, bytes: [u8; 3]) -> HypercallInstruction {
        let native = paravirt::native_instruction();
        if bytes == native {
            HypercallInstruction::Works
        } else if self.vcpu.vm().irqchip().policy().fixes_hypercalls() {
            HypercallInstruction::Rewritten(native)
        } else {
            HypercallInstruction::Undefined
        }
    }

    fn offers_monitor(&mut self, state: &CpuState) -> bool {
        let policy = self.vcpu.vm().irqchip().policy();
        policy.never_refuses_mwait() || self.cpuid(state, 1, 0).ecx & 1 << 3 != 0
    }

    fn device_instructions(&self) -> DeviceInstructions {
        if self.vcpu.vm().exits_on_emulation_failure() {
            DeviceInstructions::Emulated
        } else {
            DeviceInstructions::All
        }
    }

    fn hypercall(&mut self, state: &mut CpuState) -> Result<u64, Refusal> {
        use cpu::state::gpr;
        // `KVM_HC_VAPIC_POLL_IRQ` asks for this alone, and no other call minds.
        self.vcpu.hear_apic(self.machine);
        self.vcpu.counters().hypercalls.bump();
        let g = &state.gpr;
        let call = Hypercall {
            nr: g[gpr::RAX],
            args: [g[gpr::RBX], g[gpr::RCX], g[gpr::RDX], g[gpr::RSI]],
            width: hypercall_width(state),
            cpl: cpl(state),
        };
        let vm = self.vcpu.vm();
        let shown = self.machine.cpuid.paravirtual_features().unwrap_or(0);
        let machine = paravirt::Machine {
            features: if self.machine.enforce_pv { shown } else { !0 },
            exits_map_gpa_range: vm.hypercall_exits(12),
            apics: (vm.irqchip().mode() != ChipMode::None)
                .then(|| vm.irqchip().controllers().apics()),
            clock: vm.clock(),
            tsc: self.vcpu.tsc(),
            memory: vm,
        };
        match paravirt::call(&call, &machine) {
            Outcome::Answer(value) => Ok(value),
            Outcome::Exit => Err(Refusal::Exit(Exit::Hypercall(HypercallExit {
                nr: call.nr,
                args: call.args,
                long_mode: call.width == Width::Long,
            }))),
        }
    }
}
