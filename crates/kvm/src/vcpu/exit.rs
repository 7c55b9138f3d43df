//! `struct kvm_run`: what an exit leaves in it, and what the monitor has put there.
#![expect(
    unsafe_code,
    reason = "fields of a C union in pages that the program shares"
)]

use cpu::{
    DebugExit, Exit, HostFault, HypercallExit, InternalError, IoDirection, IoExit, MmioExit,
    MsrExit,
};
use kvm_bindings as kb;

use super::run_page::{PORT_DATA_OFFSET, RunPage};
use super::vapic::{TprAccess, TprAccessKind};

macro_rules! field {
    ($page:expr, $($path:ident).+ = $value:expr) => {
        // SAFETY: a place in `kvm_run`, whose address alone is taken.
        $page.set(|run| unsafe { &raw mut (*run).$($path).+ }, $value)
    };
    ($page:expr, $($path:ident).+) => {
        // SAFETY: as above.
        $page.get(|run| unsafe { &raw mut (*run).$($path).+ })
    };
}

impl RunPage {
    /// `exit_reason`.
    pub(super) fn set_reason(&self, reason: u32) {
        field!(self, exit_reason = reason);
    }

    /// `flags`.
    pub(super) fn clear_flags(&self) {
        field!(self, flags = 0);
    }

    /// `request_interrupt_window`.
    pub(super) fn wants_interrupt_window(&self) -> bool {
        field!(self, request_interrupt_window) != 0
    }

    /// Sets `request_interrupt_window`.
    pub fn request_interrupt_window(&self, request: u8) {
        field!(self, request_interrupt_window = request);
    }

    /// `ready_for_interrupt_injection`.
    pub fn is_ready_for_interrupt(&self) -> bool {
        field!(self, ready_for_interrupt_injection) != 0
    }

    /// `cr8`, as the monitor has it.
    pub(super) fn cr8(&self) -> u64 {
        field!(self, cr8)
    }

    /// What every exit shows.
    pub(super) fn show(&self, interrupts_on: bool, ready: bool, cr8: u8, apic_base: u64) {
        field!(self, if_flag = u8::from(interrupts_on));
        field!(self, ready_for_interrupt_injection = u8::from(ready));
        field!(self, cr8 = u64::from(cr8));
        field!(self, apic_base = apic_base);
    }

    /// `kvm_valid_regs` and `kvm_dirty_regs`.
    pub(super) fn sync_sets(&self) -> (u64, u64) {
        (field!(self, kvm_valid_regs), field!(self, kvm_dirty_regs))
    }

    /// Says that a set of registers was taken over.
    pub(super) fn clear_dirty(&self, set: u32) {
        let dirty = field!(self, kvm_dirty_regs);
        field!(self, kvm_dirty_regs = dirty & !u64::from(set));
    }

    /// The register sets behind the exit.
    pub(super) fn sync_regs(&self) -> kb::kvm_sync_regs {
        field!(self, s.regs)
    }

    pub(super) fn set_sync_regs(&self, regs: &kb::kvm_sync_regs) {
        field!(self, s.regs = *regs);
    }

    /// The bytes of an `IN` that the monitor answered.
    pub(super) fn port_input(&self, bytes: usize) -> Vec<u8> {
        self.read_bytes(PORT_DATA_OFFSET, bytes)
    }

    /// The bytes of an MMIO read that the monitor answered.
    pub(super) fn mmio_input(&self, bytes: usize) -> Vec<u8> {
        let data = field!(self, __bindgen_anon_1.mmio.data);
        data[..bytes.min(8)].to_vec()
    }

    /// The value of an MSR that the monitor answered; `None` where it wants `#GP`.
    pub(super) fn msr_input(&self) -> Option<u64> {
        let error = field!(self, __bindgen_anon_1.msr.error);
        (error == 0).then(|| field!(self, __bindgen_anon_1.msr.data))
    }

    /// The answer to a hypercall.
    pub(super) fn hypercall_input(&self) -> u64 {
        field!(self, __bindgen_anon_1.hypercall.ret)
    }

    /// `KVM_EXIT_IO`.
    pub(super) fn put_io(&self, io: &IoExit, output: &[u8]) {
        self.set_reason(kb::KVM_EXIT_IO);
        let direction = match io.direction {
            IoDirection::In => kb::KVM_EXIT_IO_IN,
            IoDirection::Out => kb::KVM_EXIT_IO_OUT,
        };
        field!(self, __bindgen_anon_1.io.direction = direction as u8);
        field!(self, __bindgen_anon_1.io.size = io.size);
        field!(self, __bindgen_anon_1.io.port = io.port);
        field!(self, __bindgen_anon_1.io.count = io.count);
        field!(
            self,
            __bindgen_anon_1.io.data_offset = PORT_DATA_OFFSET as u64
        );
        self.write_bytes(PORT_DATA_OFFSET, output);
    }

    /// `KVM_EXIT_MMIO`.
    pub(super) fn put_mmio(&self, mmio: &MmioExit) {
        self.set_reason(kb::KVM_EXIT_MMIO);
        field!(self, __bindgen_anon_1.mmio.phys_addr = mmio.gpa.raw());
        field!(
            self,
            __bindgen_anon_1.mmio.data = mmio.write.unwrap_or([0; 8])
        );
        field!(self, __bindgen_anon_1.mmio.len = u32::from(mmio.len));
        field!(
            self,
            __bindgen_anon_1.mmio.is_write = u8::from(mmio.write.is_some())
        );
    }

    /// `KVM_EXIT_X86_RDMSR`, `KVM_EXIT_X86_WRMSR`.
    pub(super) fn put_msr(&self, msr: &MsrExit) {
        self.set_reason(match msr.write {
            Some(_) => kb::KVM_EXIT_X86_WRMSR,
            None => kb::KVM_EXIT_X86_RDMSR,
        });
        field!(self, __bindgen_anon_1.msr.error = 0);
        field!(self, __bindgen_anon_1.msr.pad = [0; 7]);
        field!(self, __bindgen_anon_1.msr.reason = msr.reason);
        field!(self, __bindgen_anon_1.msr.index = msr.index);
        field!(self, __bindgen_anon_1.msr.data = msr.write.unwrap_or(0));
    }

    /// `KVM_EXIT_HYPERCALL`.
    pub(super) fn put_hypercall(&self, call: &HypercallExit) {
        self.set_reason(kb::KVM_EXIT_HYPERCALL);
        let [a, b, c, d] = call.args;
        let flags = u64::from(call.long_mode);
        field!(self, __bindgen_anon_1.hypercall.nr = call.nr);
        field!(self, __bindgen_anon_1.hypercall.args = [a, b, c, d, 0, 0]);
        field!(
            self,
            __bindgen_anon_1.hypercall.__bindgen_anon_1.flags = flags
        );
    }

    /// `KVM_EXIT_DEBUG`.
    pub(super) fn put_debug(&self, debug: &DebugExit) {
        self.set_reason(kb::KVM_EXIT_DEBUG);
        let arch = kb::kvm_debug_exit_arch {
            exception: u32::from(debug.vector),
            pad: 0,
            pc: debug.pc.raw(),
            dr6: debug.dr6,
            dr7: debug.dr7,
        };
        field!(self, __bindgen_anon_1.debug.arch = arch);
    }

    /// `KVM_EXIT_MEMORY_FAULT`, with the errno `EFAULT`.
    pub(super) fn put_memory_fault(&self, fault: &HostFault, flags: u32) {
        self.set_reason(kb::KVM_EXIT_MEMORY_FAULT);
        let gpa = fault.gpa.map_or(!0, |gpa| gpa.raw() & !0xfff);
        field!(self, __bindgen_anon_1.memory_fault.flags = u64::from(flags));
        field!(self, __bindgen_anon_1.memory_fault.gpa = gpa);
        field!(self, __bindgen_anon_1.memory_fault.size = 4096);
    }

    /// `KVM_EXIT_INTERNAL_ERROR` for an instruction that can't be run, with its bytes.
    pub(super) fn put_internal_error(&self, error: &InternalError) {
        self.set_reason(kb::KVM_EXIT_INTERNAL_ERROR);
        let mut data = [0u64; 16];
        // Flags, then the length and the bytes of the instruction.
        data[0] = u64::from(kb::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
        let mut bytes = [0u8; 16];
        bytes[0] = error.len;
        bytes[1..].copy_from_slice(&error.bytes);
        data[1] = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        data[2] = u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes"));
        field!(
            self,
            __bindgen_anon_1.internal.suberror = kb::KVM_INTERNAL_ERROR_EMULATION
        );
        field!(self, __bindgen_anon_1.internal.ndata = 3);
        field!(self, __bindgen_anon_1.internal.data = data);
    }

    /// `KVM_EXIT_FAIL_ENTRY`.
    pub(super) fn put_fail_entry(&self, reason: u64) {
        self.set_reason(kb::KVM_EXIT_FAIL_ENTRY);
        field!(
            self,
            __bindgen_anon_1.fail_entry.hardware_entry_failure_reason = reason
        );
        field!(self, __bindgen_anon_1.fail_entry.cpu = 0);
    }

    /// `KVM_EXIT_TPR_ACCESS`.
    pub(super) fn put_tpr_access(&self, access: TprAccess) {
        self.set_reason(kb::KVM_EXIT_TPR_ACCESS);
        let is_write = u32::from(access.kind == TprAccessKind::Write);
        field!(self, __bindgen_anon_1.tpr_access.rip = access.rip);
        field!(self, __bindgen_anon_1.tpr_access.is_write = is_write);
        field!(self, __bindgen_anon_1.tpr_access.pad = 0);
    }

    /// Whether the exit was made by a signal or a kick.
    pub(super) fn is_interrupted(&self) -> bool {
        field!(self, exit_reason) == kb::KVM_EXIT_INTR
    }

    /// `KVM_EXIT_IOAPIC_EOI`.
    pub(super) fn put_eoi(&self, vector: u8) {
        self.set_reason(kb::KVM_EXIT_IOAPIC_EOI);
        field!(self, __bindgen_anon_1.eoi.vector = vector);
    }
}

/// Exits without data.
pub(super) fn plain_reason(exit: &Exit) -> Option<u32> {
    match exit {
        Exit::Halt => Some(kb::KVM_EXIT_HLT),
        Exit::Shutdown => Some(kb::KVM_EXIT_SHUTDOWN),
        Exit::InterruptWindow => Some(kb::KVM_EXIT_IRQ_WINDOW_OPEN),
        _ => None,
    }
}
