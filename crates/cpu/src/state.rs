//! The architectural state of one virtual CPU, as the manuals describe it.
//!
//! This is the state between two instructions. While guest code runs, general registers, flags and
//! vector registers live in the host's own registers; every way out of guest code brings them back
//! here first.

/// Indices into [`CpuState::gpr`], in the encoding's order (SDM 2A, table 2-2).
pub mod gpr {
    #![allow(missing_docs, reason = "the names say it")]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// A segment register with its hidden part (SDM 3A, 3.4.3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied: the last valid offset for expand-up segments.
    pub limit: u32,
    /// The visible part.
    pub selector: u16,
    /// Bits 8 to 23 of the descriptor's upper half: type, S, DPL, P, AVL, L, D/B, G, in the bit
    /// positions of a VMCS access-rights field (type in bits 0 to 3, S 4, DPL 5 and 6, P 7,
    /// AVL 12, L 13, D/B 14, G 15); see [`x86::descriptor`].
    pub attributes: u16,
    /// Loaded with a null selector: any use faults.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset.
    pub limit: u16,
}

/// Segment registers in the encoding's order, then the system segments.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Segments {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
}

/// Model-specific registers whose effect is the CPU's own (all others are the platform's).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct CpuMsrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub xss: u64,
}

/// An exception, interrupt or NMI that is pending or being delivered (the fields of
/// `struct kvm_vcpu_events`, which the layer above translates one to one).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// An exception still to be delivered, or one whose delivery was interrupted.
    pub exception: Option<crate::Exception>,
    /// The exception was already injected once: delivery is repeated, not begun.
    pub exception_injected: bool,
    /// A vector that the monitor or the interrupt controller handed over for delivery, and whether
    /// it is a software interrupt (`INT n`).
    pub interrupt: Option<InjectedInterrupt>,
    /// NMIs waiting (at most two, as the hardware latches one more behind the one in service).
    pub nmi_pending: u8,
    /// An NMI is in service: further ones wait for `IRET`.
    pub nmi_masked: bool,
    /// `STI` shadow: interrupts wait for one more instruction.
    pub sti_shadow: bool,
    /// `MOV SS`/`POP SS` shadow: interrupts and debug exceptions wait for one more instruction.
    pub mov_ss_shadow: bool,
    /// A triple fault is to be reported as a shutdown.
    pub triple_fault: bool,
}

/// An interrupt on its way into the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectedInterrupt {
    /// The vector.
    pub vector: u8,
    /// From `INT n` rather than from a controller: DPL checks apply.
    pub soft: bool,
}

/// Everything architectural about one vCPU but its vector and x87 registers, which are an XSAVE
/// image of their own ([`crate::fpu`]).
///
/// `repr(C)`: translated code addresses fields by their offsets.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuState {
    /// General registers, see [`gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer (an offset into CS).
    pub rip: u64,
    /// RFLAGS, all of it, bit 1 set.
    pub rflags: u64,
    /// Segment registers.
    pub segments: Segments,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3, without bit 63 of the value that was written.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The four PAE page-directory-pointer entries, loaded by `MOV CR3` (SDM 3A, 5.4.1).
    pub pdptrs: [u64; 4],
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// PKRU.
    pub pkru: u32,
    /// The CPU's own MSRs.
    pub msrs: CpuMsrs,
    /// What the guest's TSC is ahead of the scaled host's, modulo 2^64.
    pub tsc_offset: u64,
    /// What the host's TSC is multiplied by, with 32 fractional bits; 0: it is not scaled.
    pub tsc_ratio: u64,
    /// Pending and blocked events.
    pub events: Events,
}
