//! One virtual CPU.

#![expect(
    unsafe_code,
    reason = "makes references to the frame, which translated code writes between two of them"
)]

use std::io;
use std::sync::Arc;

use memory::quiesce::{Domain, Requests};
use mmu::VcpuMmu;

use super::blocks::{Blocks, CodeContext};
use super::bounce::Bounce;
use super::cache::CodeCache;
use super::code_map::CodeMap;
use super::frame::{Frame, FrameMapping};
use super::jumps::Chains;
use super::kick::VcpuKick;
use super::memory::{Memory, MemoryView};
use super::mmio::Mmio;
use super::tlb::TlbBook;
use crate::CpuState;
use crate::emit::Asm;
use crate::fpu::FpuState;
use crate::system::{self, GuestDebug, Offer, Pending};
use crate::translate::{Branches, Mode, Tables, Translator};

/// What a [`Vcpu`] is made with.
#[derive(Clone, Debug)]
pub struct VcpuConfig {
    /// Shared by the vCPUs of one VM.
    pub code: Arc<CodeMap>,
    /// Bytes of translated code, at most 1 GiB.
    pub cache_size: usize,
    /// What CPUID offers to the guest.
    pub offer: Offer,
    /// How much code a block holds.
    pub blocks: BlockLength,
}

/// How much code of the guest is translated at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockLength {
    /// As much as hangs together.
    #[default]
    Whole,
    /// One instruction, and blocks are not chained: slow, and without whatever one instruction's
    /// translation may owe to its neighbours. To find out whether a fault is the translator's.
    OneInstruction,
}

impl BlockLength {
    /// The bits of [`Mode`] that all translations have.
    pub(super) fn mode_bits(self) -> u32 {
        match self {
            Self::Whole => 0,
            Self::OneInstruction => Mode::SINGLE,
        }
    }
}

/// One virtual CPU. Its thread may change between two runs.
pub struct Vcpu {
    pub(super) mapping: Arc<FrameMapping>,
    pub(super) kick: Arc<VcpuKick>,
    pub(super) memory: Memory,
    pub(super) cache: CodeCache,
    /// End of the fixed stubs of the cache.
    pub(super) stubs_end: u32,
    /// Offset of the stub for indirect jumps that no table knows, and of that for traps.
    pub(super) indirect_stub: u32,
    pub(super) trap_stub: u32,
    pub(super) tables: Tables,
    pub(super) translator: Translator,
    /// For small pieces of code.
    pub(super) stub: Asm,
    pub(super) blocks: Blocks,
    pub(super) chains: Chains,
    /// Grows with every emptying of the cache.
    pub(super) generation: u64,
    /// Grows where translated bytes may have been changed by the host.
    pub(super) epoch: u64,
    pub(super) seen_voids: usize,
    /// What a page of code holds now, to be compared with what was translated.
    pub(super) scratch: Box<[u8; 4096]>,
    /// What the code that runs now depends on, and what the tables of each view are for.
    pub(super) context: CodeContext,
    pub(super) contexts: [CodeContext; 3],
    /// [`crate::translate::Mode::STEP`] while instructions run one by one.
    pub(super) extra: u32,
    pub(super) length: BlockLength,
    pub(super) bounce: Bounce,
    pub(super) pending: Pending,
    /// What the functions of [`system`] changed during the present instruction.
    pub(super) effects: system::Effects,
    pub(super) guest_debug: GuestDebug,
    pub(super) offer: Offer,
    /// [`system::boundary`] is due.
    pub(super) boundary_due: bool,
    /// The state was handed out for changes.
    pub(super) state_changed: bool,
}

// SAFETY: everything in it is owned, the frame by its mapping; nothing is bound to a thread outside
// of `run`.
unsafe impl Send for Vcpu {}

impl Vcpu {
    /// A vCPU after power-up: all registers zero. It joins the VM's domain.
    pub fn new(config: VcpuConfig, mut mmu: VcpuMmu, domain: &Arc<Domain>) -> io::Result<Self> {
        let mapping = Arc::new(FrameMapping::new()?);
        let kick = Arc::new(VcpuKick::new(Arc::clone(&mapping)));
        let participant = domain.register(Arc::clone(&kick) as Arc<dyn memory::quiesce::Kick>);
        mmu.set_participant(&participant);
        let seen_voids = config.code.log_length();
        let mut vcpu = Self {
            kick,
            memory: Memory {
                mmu,
                mmio: Mmio::default(),
                code: config.code,
                domain: Arc::clone(domain),
                participant,
                book: TlbBook::default(),
                late: Requests::empty(),
            },
            cache: CodeCache::new(config.cache_size)?,
            stubs_end: 0,
            indirect_stub: 0,
            trap_stub: 0,
            tables: Tables::default(),
            translator: Translator::default(),
            stub: Asm::default(),
            blocks: Blocks::default(),
            chains: Chains::default(),
            generation: 0,
            epoch: 0,
            seen_voids,
            scratch: Box::new([0; 4096]),
            context: CodeContext::default(),
            contexts: [CodeContext::default(); 3],
            extra: 0,
            length: config.blocks,
            bounce: Bounce::default(),
            pending: Pending::default(),
            effects: system::Effects::empty(),
            guest_debug: GuestDebug::default(),
            offer: config.offer,
            boundary_due: true,
            state_changed: true,
            mapping,
        };
        vcpu.prepare();
        Ok(vcpu)
    }

    fn prepare(&mut self) {
        self.translator.vendor = self.offer.vendor;
        // The host predicts the next indirect jump from the branches taken before it: in the entries
        // that it leads to, one that is taken tells which of them it was. `LOOP` there made four
        // targets in turn twice as slow.
        self.stub.branches = Branches::Jrcxz;
        self.write_stubs();
        let leave = super::enter::leave as *const () as u64;
        let frame = self.frame_mut();
        frame.exit = leave;
        frame.fpu = FpuState::default();
        frame.state = CpuState {
            rflags: x86::rflags::FIXED,
            ..CpuState::default()
        };
        self.view().tlb().clear();
        self.forget_jumps();
    }

    pub(super) fn frame(&self) -> &Frame {
        // SAFETY: the frame is fully initialised (all zero bytes are valid, and `prepare` ran),
        // lives as long as the mapping, and only this thread refers to it, which is not in
        // translated code now.
        unsafe { self.mapping.frame().as_ref() }
    }

    pub(super) fn frame_mut(&mut self) -> &mut Frame {
        // SAFETY: as for `frame`; `&mut self` makes this the only reference.
        unsafe { &mut *self.mapping.frame().as_ptr() }
    }

    /// Memory, with the TLBs of the frame.
    pub(super) fn view(&mut self) -> MemoryView<'_> {
        // SAFETY: as for `frame_mut`.
        let frame = unsafe { &mut *self.mapping.frame().as_ptr() };
        MemoryView {
            memory: &mut self.memory,
            tlb: &mut frame.tlb,
            xtlb: &mut frame.xtlb,
        }
    }

    /// Runs a function of [`system`] on all of the state.
    pub(super) fn with_context<T>(
        &mut self,
        platform: &mut dyn crate::Platform,
        run: impl FnOnce(&mut system::Context<'_>) -> T,
    ) -> T {
        self.flags_out();
        self.settle_x87();
        self.take_shadow();
        // SAFETY: as for `frame_mut`.
        let frame = unsafe { &mut *self.mapping.frame().as_ptr() };
        self.memory.mmu.set_instruction(frame.state.rip);
        let mut view = MemoryView {
            memory: &mut self.memory,
            tlb: &mut frame.tlb,
            xtlb: &mut frame.xtlb,
        };
        let mut context = system::Context {
            state: &mut frame.state,
            fpu: &mut frame.fpu,
            memory: &mut view,
            platform,
            offer: &self.offer,
            pending: &mut self.pending,
            guest_debug: &self.guest_debug,
            effects: self.effects,
        };
        let result = run(&mut context);
        let effects = context.effects;
        self.effects = effects;
        self.flags_in();
        self.after_system(effects);
        result
    }

    /// The architectural state. Complete only outside of [`Vcpu::run`], where all callers are.
    pub fn state(&self) -> &CpuState {
        &self.frame().state
    }

    /// The architectural state, to be changed.
    pub fn state_mut(&mut self) -> &mut CpuState {
        self.state_changed = true;
        &mut self.frame_mut().state
    }

    /// Vector and floating-point registers.
    pub fn fpu(&self) -> &FpuState {
        &self.frame().fpu
    }

    /// Vector and floating-point registers, to be changed.
    pub fn fpu_mut(&mut self) -> &mut FpuState {
        &mut self.frame_mut().fpu
    }

    /// The vCPU's side of the MMU: features, dirty ring, probes.
    pub fn mmu(&self) -> &VcpuMmu {
        &self.memory.mmu
    }

    /// The vCPU's side of the MMU. Its registers follow [`Vcpu::state`] by themselves.
    pub fn mmu_mut(&mut self) -> &mut VcpuMmu {
        self.state_changed = true;
        &mut self.memory.mmu
    }

    /// What the monitor watches for. A step of the monitor's that is not told yet is forgotten with
    /// its wish to step: the guest must not see it.
    pub fn set_guest_debug(&mut self, debug: GuestDebug) {
        if !debug.single_step && !self.state().flags_have(x86::rflags::TF) {
            self.pending.debug &= !x86::debug::DR6_BS;
        }
        self.guest_debug = debug;
        self.boundary_due = true;
    }

    /// What CPUID offers has changed.
    pub fn set_offer(&mut self, offer: Offer) {
        self.offer = offer;
        if self.translator.vendor != offer.vendor {
            self.translator.vendor = offer.vendor;
            self.forget_translations();
        }
    }

    /// How translated code branches on a register; what suits the host if it is never said.
    pub fn set_branches(&mut self, branches: Branches) {
        self.translator.asm.branches = branches;
        self.forget_translations();
    }

    /// The handle by which others make this vCPU leave guest code.
    pub fn kicker(&self) -> Arc<VcpuKick> {
        Arc::clone(&self.kick)
    }

    /// The bytes that go out with [`crate::Exit::Io`]; empty for input.
    pub fn output(&self) -> &[u8] {
        self.pending.exit.output()
    }

    /// Whether an instruction has had answers and is not over: it must run on before anybody may
    /// take the state for that between two instructions.
    pub fn is_mid_instruction(&self) -> bool {
        matches!(self.pending.exit, system::PendingExit::InsData { .. })
            || self.memory.mmio.is_busy()
    }

    /// The monitor has dealt with [`crate::Exit::Io`]: the bytes that come in (none for `OUT`).
    pub fn complete_io(&mut self, data: &[u8]) {
        // SAFETY: as for `frame_mut`.
        let frame = unsafe { &mut *self.mapping.frame().as_ptr() };
        system::complete_io(&mut frame.state, &mut self.pending, data);
    }

    /// The instruction that wrote last to memory where its operand could not lie: a write to a
    /// device leaves when RIP is behind it already.
    pub fn last_store(&self) -> u64 {
        self.bounce.rip
    }

    /// The monitor has dealt with [`crate::Exit::Mmio`]: the bytes read (none for a write).
    pub fn complete_mmio(&mut self, data: &[u8]) {
        self.memory.mmio.complete(data);
    }

    /// The monitor has dealt with [`crate::Exit::Msr`]: the value read, or `None` for `#GP`.
    pub fn complete_msr(&mut self, value: Option<u64>) {
        // SAFETY: as for `frame_mut`.
        let frame = unsafe { &mut *self.mapping.frame().as_ptr() };
        system::complete_msr(&mut frame.state, &mut self.pending, value);
    }

    /// The monitor has dealt with [`crate::Exit::Hypercall`]: RAX.
    pub fn complete_hypercall(&mut self, result: u64) {
        // SAFETY: as for `frame_mut`.
        let frame = unsafe { &mut *self.mapping.frame().as_ptr() };
        system::complete_hypercall(&mut frame.state, &mut self.pending, result);
    }
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu")
            .field("rip", &self.state().rip)
            .field("blocks", &self.blocks.blocks.len())
            .finish_non_exhaustive()
    }
}
