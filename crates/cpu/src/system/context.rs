//! What a system instruction works on, and what it leaves behind.

use bitflags::bitflags;

use super::memory::LinearMemory;
use super::offer::Offer;
use super::pending::PendingExit;
use crate::fpu::FpuState;
use crate::{CpuState, Platform};

bitflags! {
    /// What changed under the translator's feet.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Effects: u32 {
        /// CPL, real, protected, virtual-8086 or long mode, CS.L, CS.D or SS.B, or whether a segment
        /// is flat: blocks are looked up by another key.
        const MODE = 1 << 0;
        /// A base, limit or attribute of a segment register.
        const SEGMENTS = 1 << 1;
        /// CR0, CR3, CR4, EFER, PKRU or PDPTEs. Memory was told already.
        const PAGING = 1 << 2;
        /// Whether x87, SSE or AVX instructions fault: CR0.TS, MP, EM, NE, CR4.OSFXSR, OSXMMEXCPT,
        /// OSXSAVE, XCR0.
        const FPU = 1 << 3;
        /// An event may be deliverable that was not before: IF was set, a shadow begun or ended, an
        /// NMI unmasked, the task priority lowered, a trap noted. [`super::boundary`] is called next.
        const EVENTS = 1 << 4;
        /// DR0 to DR3, DR7, TF, RF or a shadow: [`super::must_step`] may have changed.
        const DEBUG = 1 << 5;
        /// RFLAGS.AC changed, or CR4.SMAP: which rights explicit accesses have.
        const ACCESS_RIGHTS = 1 << 6;
        /// RIP is not that of the next instruction.
        const JUMP = 1 << 7;
        /// An event was delivered: no single-step trap of the instruction that was running.
        const DELIVERED = 1 << 8;
        /// This instruction began a shadow (STI, MOV SS, POP SS).
        const SHADOW = 1 << 9;
        /// A task switch is past its commit point: the state is the new task's, even if a fault
        /// follows.
        const TASK_SWITCHED = 1 << 11;
        /// The instruction loaded RF for the one that follows (`IRET`, a task switch).
        const RF_LOADED = 1 << 12;
        /// IF was set, by an instruction that begins no shadow; nothing else became deliverable.
        const INTERRUPTS = 1 << 13;
        /// PKRU alone.
        const PKRU = 1 << 10;
    }
}

/// What follows an instruction that ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The instruction behind it.
    Sequential,
    /// Whatever RIP says.
    Jump,
    /// The same instruction again: a string instruction between two elements. Events are looked at
    /// first.
    Again,
}

/// What the monitor watches for (`KVM_SET_GUEST_DEBUG`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Anything at all is asked for.
    pub enabled: bool,
    /// Report after every instruction.
    pub single_step: bool,
    /// Report `INT3` instead of delivering `#BP`.
    pub software_breakpoints: bool,
    /// Use these debug registers instead of the guest's.
    pub hardware_breakpoints: bool,
    /// Deliver no interrupts while stepping.
    pub block_interrupts: bool,
    /// DR0 to DR3 of the monitor.
    pub dr: [u64; 4],
    /// DR7 of the monitor.
    pub dr7: u64,
}

/// An `STI` shadow while no interrupt waits.
///
/// It covers the instruction at `rip`, and is over once RIP is elsewhere. So nothing has to run alone
/// until an event comes while RIP is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyShadow {
    /// RIP behind the `STI`.
    pub rip: u64,
    /// The look at events that follows the `STI` itself has been.
    pub seen: bool,
}

/// What lives between two instructions and is in no register: kept by the vCPU.
#[derive(Clone, Debug, Default)]
pub struct Pending {
    /// Bits of DR6 that the next `#DB` trap reports; nonzero means that one is due.
    pub debug: u64,
    /// The exit that the monitor is working on, or its answer.
    pub exit: PendingExit,
    /// Where an `STI` shadow that nobody waits for ends; see [`super::must_step`].
    pub lazy_shadow: Option<LazyShadow>,
    /// RIP of the instruction for which RF is set, while nothing looks at RF; see
    /// [`super::put_rf_aside`].
    pub resumes: Option<u64>,
    /// An answer has ended an instruction outside of a run: a step for a monitor that steps.
    pub retired: bool,
}

/// One vCPU as the functions of this module see it.
pub struct Context<'a> {
    /// The architectural state.
    pub state: &'a mut CpuState,
    /// Vector and floating-point registers; valid where [`super::fpu_use`] says so.
    pub fpu: &'a mut FpuState,
    /// Memory by linear address.
    pub memory: &'a mut dyn LinearMemory,
    /// The machine around the CPU.
    pub platform: &'a mut dyn Platform,
    /// What CPUID offers to this guest.
    pub offer: &'a Offer,
    /// What lives between two instructions.
    pub pending: &'a mut Pending,
    /// What the monitor watches for.
    pub guest_debug: &'a GuestDebug,
    /// What changed; only ever added to.
    pub effects: Effects,
}
