//! One vCPU's side of the MMU: its registers, and the translation of its accesses.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::sync::Mutex;
use std::time::Instant;

use addr::{Gpa, Gva, Hva, PageSize};
use memory::ahead::{Ahead, Look};
use memory::dirty::{DirtyRing, RingError};
use memory::quiesce::{Participant, Requests};
use memory::slot;
use x86::paging::PagingMode;

use crate::access::{Access, AccessKind, Fault, Translation};
use crate::event::Cause;
use crate::fill::{Fill, HostPage};
use crate::mmu::{Mmu, SharedRing, lock};
use crate::nested::Spare;
use crate::registers::{PagingFeatures, PagingRegisters, Regime};
use crate::rights;
use crate::shadow::{Flush, Path, Retry, Roots, Shadow, Waiting};
use crate::stats::VcpuStats;
use crate::walker::{self, AccessedDirty, GuestPage, Observer, WalkFault};

/// What a change of the vCPU's translations asks of the CPU beyond what the architecture asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a TLB that keeps what the MMU took away is wrong"]
pub enum TlbEffect {
    /// Nothing: flush what the architecture says.
    Architectural,
    /// Drop every entry, global ones and those of other PCIDs included, and pass a checkpoint
    /// before the next instruction: somebody may have asked for something meanwhile.
    FlushAll,
}

/// Where an address leads, found without side effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What the guest's tables say.
    pub page: GuestPage,
    /// Where the byte lies in the monitor, if in a memslot.
    pub hva: Option<Hva>,
}

/// The MMU of one vCPU; used in that vCPU's thread alone.
///
/// [`VcpuMmu::translate`] is called in guest mode (inside the VM's `Domain`): what it returns is
/// valid until the vCPU's next checkpoint.
pub struct VcpuMmu {
    mmu: Arc<Mmu>,
    id: u32,
    /// The instruction that runs, for those who watch faults.
    rip: u64,
    space: usize,
    registers: PagingRegisters,
    features: PagingFeatures,
    regime: Regime,
    spare: Spare,
    stats: Arc<VcpuStats>,
    slots: slot::Reader,
    ring: Option<SharedRing>,
    /// This vCPU among the readers, for waiting for the others while inside.
    participant: Option<Arc<Participant>>,
    /// Roots of shadow tables, on that path.
    roots: Option<Roots>,
    /// Where the guest's writes go.
    ahead: Ahead,
}

impl VcpuMmu {
    /// The MMU of vCPU `id`, with paging off.
    pub fn new(mmu: &Arc<Mmu>, id: u32) -> Self {
        let registers = PagingRegisters::default();
        let features = PagingFeatures::default();
        let stats = Arc::new(VcpuStats::default());
        mmu.register_vcpu(&stats);
        Self {
            mmu: Arc::clone(mmu),
            id,
            rip: 0,
            space: 0,
            registers,
            features,
            regime: Regime::new(&registers, features),
            spare: Spare::new(),
            stats,
            slots: mmu.slots().reader(0),
            ring: None,
            participant: None,
            roots: mmu.shadow.as_ref().map(Shadow::new_roots),
            ahead: Ahead::default(),
        }
    }

    /// Which of the VM's readers this vCPU is. The shadow path protects guest tables only when it
    /// knows that, because it must wait for the other vCPUs without waiting for itself.
    pub fn set_participant(&mut self, participant: &Arc<Participant>) {
        self.participant = Some(Arc::clone(participant));
    }

    /// The VM's MMU.
    pub fn mmu(&self) -> &Arc<Mmu> {
        &self.mmu
    }

    /// RIP of the instruction whose accesses follow: it is told with their faults.
    #[inline]
    pub fn set_instruction(&mut self, rip: u64) {
        self.rip = rip;
    }

    /// Its counters.
    pub fn stats(&self) -> &Arc<VcpuStats> {
        &self.stats
    }

    /// What the registers mean.
    pub fn regime(&self) -> &Regime {
        &self.regime
    }

    /// The registers as last set.
    pub fn registers(&self) -> &PagingRegisters {
        &self.registers
    }

    /// What CPUID says about paging. The CPU flushes its TLB afterwards, all of it.
    pub fn set_features(&mut self, features: PagingFeatures) -> TlbEffect {
        self.features = features;
        self.regime = Regime::new(&self.registers, features);
        self.flush_shadow()
    }

    /// The address space of memslots: 0, or 1 in system management mode. The CPU flushes its TLB,
    /// all of it.
    pub fn set_address_space(&mut self, space: usize) -> TlbEffect {
        // Tables at hand belong to the second level that they were taken from.
        self.return_spare();
        self.space = space;
        self.slots = self.mmu.slots().reader(space);
        self.flush_shadow()
    }

    /// The registers, after any of them was written. The CPU flushes its TLB as the architecture
    /// says, and as the answer says. A write that flushes although it changes nothing (CR3 with the
    /// same value) needs [`VcpuMmu::invalidate_all`].
    pub fn set_registers(&mut self, registers: &PagingRegisters) -> TlbEffect {
        let before = std::mem::replace(&mut self.registers, *registers);
        self.regime = Regime::new(registers, self.features);
        let pkru = before.pkru;
        if before == (PagingRegisters { pkru, ..*registers }) {
            return TlbEffect::Architectural;
        }
        self.flush_shadow()
    }

    /// `INVLPG`, or `INVPCID` of one address in the present context.
    pub fn invalidate_page(&mut self, gva: Gva) -> TlbEffect {
        self.stats.invlpg.increment();
        if let (Some(shadow), Some(roots)) = (&self.mmu.shadow, &self.roots) {
            shadow.flush_page(roots, &self.regime, self.regime.linear(gva));
        }
        TlbEffect::Architectural
    }

    /// Everything else that invalidates: a write to CR3 that flushes, `INVPCID` of a context or of
    /// all, a change of CR0 or CR4 that flushes.
    pub fn invalidate_all(&mut self) -> TlbEffect {
        self.stats.tlb_flush.increment();
        self.flush_shadow()
    }

    /// To be called at a checkpoint, between two instructions: begins anew with shadow tables that have
    /// grown beyond their limit. [`VcpuMmu::translate`] asks for a flush where they have.
    pub fn keep_limits(&mut self) -> TlbEffect {
        if self.mmu.has_too_much_shadow() {
            self.flush_shadow()
        } else {
            TlbEffect::Architectural
        }
    }

    /// Brings shadow tables in step, and finds the roots for the present registers.
    fn flush_shadow(&mut self) -> TlbEffect {
        let (Some(shadow), Some(roots)) = (&self.mmu.shadow, &mut self.roots) else {
            return TlbEffect::Architectural;
        };
        let waiting = match self.participant {
            Some(_) => Waiting::Possible,
            None => Waiting::Impossible,
        };
        let mut effect = TlbEffect::Architectural;
        if let Flush::Protecting(settling) = shadow.flush(waiting) {
            self.mmu.flush_others(self.participant.as_deref());
            shadow.settle(settling);
            effect = TlbEffect::FlushAll;
        }
        if waiting == Waiting::Possible && self.mmu.bound_shadow(self.participant.as_deref()) {
            effect = TlbEffect::FlushAll;
        }
        shadow.find_roots(&self.mmu, roots, self.space, &self.regime);
        effect
    }

    /// A dirty ring of `bytes` bytes of zeroed memory at `entries`, which outlives this vCPU.
    pub fn set_dirty_ring(&mut self, entries: Hva, bytes: u64) -> Result<(), RingError> {
        let ring = Arc::new(Mutex::new(DirtyRing::new(entries, bytes)?));
        self.mmu.register_ring(&ring);
        self.ring = Some(ring);
        Ok(())
    }

    /// Whether the vCPU must leave with `KVM_EXIT_DIRTY_RING_FULL` before it goes on.
    pub fn dirty_ring_full(&self) -> bool {
        self.ring.as_ref().is_some_and(|r| lock(r).is_soft_full())
    }

    /// Translates `gva` for `access`: walks the guest's tables, sets A and D, fills this path's
    /// tables, marks the dirty log.
    #[inline]
    pub fn translate(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        self.stats.tlb_fill.increment();
        let mut answer = if self.roots.is_some() {
            self.translate_shadow(gva, access)
        } else {
            self.translate_walking(gva, access)
        };
        if self.mmu.tracking.load(Ordering::Relaxed)
            && let Ok(translation) = &mut answer
        {
            self.mmu.mark_accessed(self.space, translation);
        }
        answer
    }

    /// Nested and direct.
    fn translate_walking(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let (mut fill, regime) = self.fill(gva, access);
        let page = match walker::walk(&mut fill, regime, gva, access, AccessedDirty::Set, &mut ()) {
            Ok(page) => page,
            Err(fault) => return Err(guest_fault(&fill, fault)),
        };
        match fill.host_page(page.gpa, access.kind) {
            Ok(host) => {
                if fill.mmu.is_direct() {
                    fill.tell_installed(Cause::TlbFill, page.gpa, &host);
                }
                let answer = translation(regime, access, &page, &host);
                if access.is_write()
                    && !self.mmu.is_observed()
                    && self.ahead.written(host.hva) == Look::Due
                {
                    self.look_ahead(page.gpa, host.hva);
                }
                Ok(answer)
            }
            Err(fault) => Err(left(&fill, fault)),
        }
    }

    /// Has the host provide pages in front of a run of writes, as far as the slot goes.
    #[cold]
    fn look_ahead(&mut self, gpa: Gpa, hva: Hva) {
        let gfn = gpa.frame();
        if let Some(slot) = self.slots.find(gfn) {
            let pages = slot.end_gfn().number() - gfn.number();
            let left = pages << PageSize::Size4K.shift();
            let mmu = &self.mmu;
            let participant = self.participant.as_deref();
            let wanted = || participant.is_some_and(Participant::has_requests);
            self.ahead
                .look(hva, left, &mmu.helper, mmu.domain(), wanted);
        }
    }

    fn translate_shadow(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let (Some(shadow), Some(roots)) = (&self.mmu.shadow, &self.roots) else {
            return Err(Fault::Mmio { gpa: Gpa::new(0) });
        };
        let linear = self.regime.linear(gva);
        if let Some((page, host)) = shadow.lookup(roots, &self.regime, linear) {
            let hit = rights::check(&self.regime, page.rights, page.pkey, access).is_ok();
            if hit && (!access.is_write() || (page.dirty && host.writable)) {
                return Ok(translation(&self.regime, access, &page, &host));
            }
        }
        self.shadow_fault(gva, access)
    }

    /// Nothing cached that allows the access.
    #[inline(never)]
    fn shadow_fault(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let mmu = Arc::clone(&self.mmu);
        // A guest that never flushes may not have tables without end. Nothing is taken away here: the
        // instruction may hold another translation, and this vCPU must not wait for others meanwhile.
        if mmu.has_too_much_shadow()
            && let Some(participant) = &self.participant
        {
            participant.request(Requests::FLUSH_TLB);
        }
        let mut roots = self.roots.take();
        let result = match (&mmu.shadow, &mut roots) {
            (Some(shadow), Some(roots)) => self.shadow_walk(shadow, roots, gva, access),
            _ => unreachable!("the shadow path has both"),
        };
        self.roots = roots;
        result
    }

    fn shadow_walk(
        &mut self,
        shadow: &Shadow,
        roots: &mut Roots,
        gva: Gva,
        access: Access,
    ) -> Result<Translation, Fault> {
        let (mut fill, regime) = self.fill(gva, access);
        fill.stats.pf_taken.increment();
        loop {
            let mut path = Path::default();
            let mut observer = |step| path.record(step, regime.mode);
            let set = AccessedDirty::Set;
            let walked = walker::walk(&mut fill, regime, gva, access, set, &mut observer);
            let page = match walked {
                Ok(page) => page,
                Err(fault) => {
                    // A page fault invalidates what is cached for its address (SDM 3A, 5.10.4.1).
                    shadow.flush_page(roots, regime, regime.linear(gva));
                    return Err(guest_fault(&fill, fault));
                }
            };
            let host = if regime.mode == PagingMode::Off {
                Ok(shadow.unpaged(&mut fill, page.gpa))
            } else {
                shadow.install(&mut fill, roots, regime, &path, &page)
            };
            match host {
                Err(Retry) => {}
                Ok(Err(fault)) => return Err(left(&fill, fault)),
                Ok(Ok(host)) => {
                    fill.stats.pf_fixed.increment();
                    fill.tell_installed(Cause::NotPresent, page.gpa, &host);
                    return Ok(translation(regime, access, &page, &host));
                }
            }
        }
    }

    /// What `translate` would find, but without any side effect: for `KVM_TRANSLATE` and `explain`.
    /// The observer sees each entry of the guest's tables.
    pub fn probe<O: Observer>(
        &mut self,
        gva: Gva,
        access: Access,
        observer: &mut O,
    ) -> Result<Probe, Fault> {
        let slots = Arc::clone(self.mmu.slots());
        let table = slots.snapshot(self.space);
        let mut memory = crate::slot_tables::SlotTables::new(&table);
        let policy = AccessedDirty::Leave;
        let page = walker::walk(&mut memory, &self.regime, gva, access, policy, observer)
            .map_err(Fault::from)?;
        let hva = table
            .find(page.gpa.frame())
            .and_then(|s| s.hva_at(page.gpa));
        Ok(Probe { page, hva })
    }

    /// The PDPTEs that a `MOV` to CR3 loads in PAE paging (SDM 3A, 5.4.1). `None`: one of them is
    /// present with a reserved bit set, or lies outside memory, and the instruction faults with
    /// `#GP(0)`.
    pub fn load_pdptrs(&mut self, cr3: u64) -> Option<[u64; 4]> {
        let table = self.mmu.slots.snapshot(self.space);
        let mut memory = crate::slot_tables::SlotTables::new(&table);
        crate::slot_tables::load_pdptrs(&mut memory, Gpa::new(cr3 & 0xffff_ffe0), self.features)
    }

    fn fill(&mut self, gva: Gva, access: Access) -> (Fill<'_>, &Regime) {
        let fill = Fill {
            mmu: &self.mmu,
            space: self.space,
            second: self.mmu.second.get(self.space),
            spare: &mut self.spare,
            stats: &self.stats,
            slots: &mut self.slots,
            ring: self.ring.as_ref(),
            vcpu: self.id,
            rip: self.rip,
            gva,
            access,
            started: self.mmu.is_observed().then(Instant::now),
        };
        (fill, &self.regime)
    }

    fn return_spare(&mut self) {
        if let Some(second) = self.mmu.second.get(self.space) {
            second.return_spare(&mut self.spare);
        }
    }

    /// The mode of paging.
    pub fn mode(&self) -> PagingMode {
        self.regime.mode()
    }
}

impl Drop for VcpuMmu {
    fn drop(&mut self) {
        if let (Some(shadow), Some(roots)) = (&self.mmu.shadow, &mut self.roots) {
            shadow.drop_roots(roots);
        }
        self.return_spare();
    }
}

impl From<WalkFault> for Fault {
    fn from(fault: WalkFault) -> Self {
        match fault {
            WalkFault::Page(fault) => Self::Page(fault),
            WalkFault::Host(fault) => Self::Host(fault),
        }
    }
}

/// Counts and tells a fault of the walk.
#[cold]
fn guest_fault(fill: &Fill<'_>, fault: WalkFault) -> Fault {
    match fault {
        WalkFault::Page(page) => {
            fill.stats.pf_guest.increment();
            fill.tell(Cause::Guest(page.error_code), None, None, None);
        }
        WalkFault::Host(host) => {
            fill.tell(Cause::Host, Some(host.gpa), Some(host.hva), None);
        }
    }
    fault.into()
}

/// Counts and tells an access that leaves for the monitor.
#[cold]
fn left(fill: &Fill<'_>, fault: Fault) -> Fault {
    match fault {
        Fault::Mmio { gpa } => {
            fill.stats.pf_emulate.increment();
            fill.tell(Cause::Mmio, Some(gpa), None, None);
        }
        Fault::ReadOnly { gpa, hva } => {
            fill.stats.pf_emulate.increment();
            fill.tell(Cause::ReadOnly, Some(gpa), Some(hva), None);
        }
        Fault::Page(_) | Fault::Host(_) => {}
    }
    fault
}

/// Both halves of the answer together.
#[inline]
pub(crate) fn translation(
    regime: &Regime,
    access: Access,
    page: &GuestPage,
    host: &HostPage,
) -> Translation {
    let may = |kind| rights::allows(regime, page.rights, page.pkey, access.privilege, kind);
    Translation {
        gpa: page.gpa,
        hva: host.hva,
        size: page.size.min(host.size),
        guest_size: page.size,
        user: page.rights.contains(rights::Rights::USER),
        readable: may(AccessKind::Read),
        writable: page.dirty && host.writable && may(AccessKind::Write),
        executable: may(AccessKind::Execute),
        global: page.global,
        pkey: page.pkey,
    }
}
