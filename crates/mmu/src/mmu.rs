//! What the vCPUs of one VM share.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, Weak};

use memory::sync::{Mutex, MutexGuard};

use addr::{Gpa, Gva};
use arc_swap::ArcSwapOption;
use memory::access;
use memory::ahead::Helper;
use memory::dirty::DirtyRing;
use memory::quiesce::{Domain, Participant, Requests};
use memory::slot::{Listener, Slots};
use x86::paging::PagingMode;

use crate::event::{FaultEvent, Subscriber};
use crate::nested::{SecondLevel, SecondLevelEntry};
use crate::registers::Regime;
use crate::shadow::{Shadow, ShadowEntry};
use crate::stats::{ShadowStats, VcpuStats, VmStats};
use crate::totals;
use crate::working_set::Tracker;

/// How a guest's address becomes a host pointer. The guest can't tell which it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PagingPath {
    /// The guest's tables, then the second level, which is filled lazily.
    #[default]
    Nested,
    /// Shadow tables, kept in step with the guest's.
    Shadow,
    /// The guest's tables, then the memslots; nothing is kept but the CPU's TLB.
    Direct,
}

/// What an [`Mmu`] is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmuConfig {
    /// Which path.
    pub path: PagingPath,
    /// What decides on large entries of the second level.
    pub large_pages: LargePages,
    /// Guest physical addresses of at most so many bits get entries in the second level (31 to 52);
    /// what lies beyond is looked up in the memslots each time.
    pub max_phys_bits: u8,
    /// Shadow pages to keep at most; beyond, all are dropped and made anew as needed
    /// ([`Mmu::set_shadow_limit`]).
    pub shadow_pages: usize,
}

impl Default for MmuConfig {
    fn default() -> Self {
        Self {
            path: PagingPath::Nested,
            large_pages: LargePages::OfSlot,
            max_phys_bits: 46,
            shadow_pages: 8192,
        }
    }
}

/// What decides on the size of the second level's entries, where the memslot has room for a large one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LargePages {
    /// The slot alone. The second level leads to host *virtual* addresses, which are contiguous
    /// whatever frames the host has: fewest faults, smallest tables.
    #[default]
    OfSlot,
    /// The host, too: only what it keeps in a huge frame gets a large entry, as in kvm.ko, whose page
    /// statistics monitors and tests read. A huge page that the host makes later is not noticed.
    OfHost,
}

/// A vCPU's ring, shared with whoever resets it.
pub(crate) type SharedRing = Arc<Mutex<DirtyRing>>;

/// The MMU of one VM.
///
/// # Locks
/// Order: the slots' writer lock, then that of changes to the second level, then that of the shadow
/// tables. None is held while waiting for vCPUs but the first, which no vCPU takes in guest mode.
pub struct Mmu {
    pub(crate) slots: Arc<Slots>,
    pub(crate) config: MmuConfig,
    /// One second level per address space; none on the other paths.
    pub(crate) second: Vec<SecondLevel>,
    /// The shadow tables; none on the other paths.
    pub(crate) shadow: Option<Shadow>,
    /// The most shadow pages.
    shadow_limit: AtomicUsize,
    /// Serialises those who take entries away from the second level.
    pub(crate) changes: Mutex<()>,
    rings: Mutex<Vec<SharedRing>>,
    vcpus: Mutex<Vec<Arc<VcpuStats>>>,
    stats: VmStats,
    /// Provides pages in front of writes.
    pub(crate) helper: Helper,
    observed: AtomicBool,
    subscriber: ArcSwapOption<Box<dyn Subscriber>>,
    pub(crate) tracking: AtomicBool,
    pub(crate) tracker: ArcSwapOption<Tracker>,
}

impl Mmu {
    /// An MMU for these slots. It listens to their changes until it is dropped.
    pub fn new(slots: &Arc<Slots>, config: MmuConfig) -> Arc<Self> {
        let spaces = match config.path {
            PagingPath::Nested => slots.config().address_spaces,
            PagingPath::Shadow | PagingPath::Direct => 0,
        };
        let mmu = Arc::new(Self {
            slots: Arc::clone(slots),
            config,
            second: (0..spaces)
                .map(|_| SecondLevel::new(config.max_phys_bits.into()))
                .collect(),
            shadow: (config.path == PagingPath::Shadow).then(Shadow::default),
            shadow_limit: AtomicUsize::new(config.shadow_pages),
            changes: Mutex::default(),
            rings: Mutex::default(),
            vcpus: Mutex::default(),
            stats: VmStats::default(),
            helper: Helper::new(),
            observed: AtomicBool::new(false),
            subscriber: ArcSwapOption::empty(),
            tracking: AtomicBool::new(false),
            tracker: ArcSwapOption::empty(),
        });
        let listener: Weak<dyn Listener> = Arc::downgrade(&mmu) as Weak<dyn Listener>;
        slots.listen(listener);
        mmu
    }

    /// The slots that it translates by.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// The VM's readers.
    pub fn domain(&self) -> &Arc<Domain> {
        self.slots.domain()
    }

    /// The path.
    pub fn path(&self) -> PagingPath {
        self.config.path
    }

    /// The VM's counters.
    pub fn stats(&self) -> &VmStats {
        &self.stats
    }

    /// The counters of the shadow tables.
    pub fn shadow_stats(&self) -> ShadowStats {
        self.shadow
            .as_ref()
            .map_or_else(ShadowStats::default, Shadow::stats)
    }

    /// Pages mapped now: 4 KiB, 2 MiB, 1 GiB (kvm's `pages_4k`, `pages_2m`, `pages_1g`).
    pub fn pages(&self) -> [u64; 3] {
        let mut sums = [0_i64; 3];
        let second = self.second.iter().map(|s| s.counts.get());
        for counts in second.chain(self.shadow.iter().map(Shadow::counts)) {
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
        }
        sums.map(|n| u64::try_from(n).unwrap_or(0))
    }

    /// Bytes of the tables of this path.
    pub fn table_bytes(&self) -> usize {
        let second: usize = self.second.iter().map(SecondLevel::bytes).sum();
        second + self.shadow.as_ref().map_or(0, Shadow::bytes)
    }

    /// The counters of all vCPUs that exist.
    pub fn vcpu_stats(&self) -> Vec<Arc<VcpuStats>> {
        lock(&self.vcpus).clone()
    }

    /// Sets who sees faults, or `None` for nobody.
    pub fn set_subscriber(&self, subscriber: Option<Box<dyn Subscriber>>) {
        let observed = subscriber.is_some();
        self.subscriber.store(subscriber.map(Arc::new));
        self.observed.store(observed, Ordering::Release);
    }

    /// The entries of the second level on the way to `gpa`, from the root on; for those who show.
    pub fn second_level(&self, address_space: usize, gpa: Gpa) -> Vec<SecondLevelEntry> {
        self.second
            .get(address_space)
            .map_or_else(Vec::new, |second| second.path_to(gpa.frame()))
    }

    /// The entries of the shadow tables on the way to `gva`, for a vCPU in this regime; for those
    /// who show.
    pub fn shadow_path(&self, address_space: usize, regime: &Regime, gva: Gva) -> Vec<ShadowEntry> {
        let linear = regime.linear(gva);
        let top = match regime.mode() {
            PagingMode::Off => return Vec::new(),
            PagingMode::Pae => regime.tops()[(linear >> 30 & 3) as usize],
            _ => regime.tops()[0],
        };
        let table = self.slots.snapshot(address_space);
        let root = top
            .and_then(|gpa| table.find(gpa.frame())?.hva_of(gpa.frame()))
            .map(addr::Hva::frame);
        match (&self.shadow, root) {
            (Some(shadow), Some(root)) => shadow.path_to(root, address_space, regime, linear),
            _ => Vec::new(),
        }
    }

    /// Takes back the entries that the monitor collected from all dirty rings, and has the next
    /// write to each page noticed (`KVM_RESET_DIRTY_RINGS`). Returns how many.
    pub fn reset_dirty_rings(&self) -> Result<u32, access::HostFault> {
        let rings = lock(&self.rings).clone();
        let mut pages = Vec::new();
        let mut count = 0;
        for ring in rings {
            count += lock(&ring).reset(|page| pages.push(page))?;
        }
        if !pages.is_empty() {
            self.protect_ring_pages(&pages);
            self.flush_vcpus();
        }
        Ok(count)
    }

    /// Checks the rules of the tables; nobody may use the MMU meanwhile.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.second
            .iter()
            .try_for_each(SecondLevel::check_invariants)?;
        self.shadow
            .as_ref()
            .map_or(Ok(()), Shadow::check_invariants)
    }

    /// Every vCPU drops its TLB and has passed a checkpoint.
    pub(crate) fn flush_vcpus(&self) {
        let none = self.flush_vcpus_from(None);
        debug_assert!(none.is_empty(), "no vCPU asked");
    }

    /// The same, asked by a vCPU. What others asked of it meanwhile is asked again: it finds it at
    /// its next checkpoint, which it passes before it goes on ([`crate::TlbEffect::FlushAll`]).
    pub(crate) fn flush_others(&self, from: Option<&Participant>) {
        let asked = self.flush_vcpus_from(from);
        if let Some(from) = from
            && !asked.is_empty()
        {
            from.request(asked);
        }
    }

    /// The most shadow pages from now on; with more of them the shadow tables begin anew at the next
    /// checkpoint. The other paths have none.
    pub fn set_shadow_limit(&self, pages: usize) {
        self.shadow_limit.store(pages, Ordering::Relaxed);
        self.bound_shadow(None);
    }

    /// Whether there are more shadow pages than allowed.
    pub(crate) fn has_too_much_shadow(&self) -> bool {
        let limit = self.shadow_limit.load(Ordering::Relaxed);
        self.shadow.as_ref().is_some_and(|s| s.pages() > limit)
    }

    /// Begins anew with the shadow tables if there are too many pages; whether it has.
    pub(crate) fn bound_shadow(&self, from: Option<&Participant>) -> bool {
        let too_many = self.has_too_much_shadow();
        if let Some(shadow) = self.shadow.as_ref().filter(|_| too_many) {
            self.stats.mmu_recycled.add(shadow.pages() as u64);
            let limbo = shadow.clear();
            self.flush_others(from);
            shadow.recycle(limbo);
        }
        too_many
    }

    #[must_use]
    fn flush_vcpus_from(&self, from: Option<&Participant>) -> Requests {
        self.stats.remote_tlb_flush_requests.add(1);
        self.stats.remote_tlb_flush.add(1);
        self.domain().request_and_wait(Requests::FLUSH_TLB, from)
    }

    /// Whether faults are to be timed and told.
    #[inline]
    pub(crate) fn is_observed(&self) -> bool {
        !cfg!(feature = "unobserved") && self.observed.load(Ordering::Relaxed)
    }

    #[cold]
    pub(crate) fn tell(&self, event: &FaultEvent) {
        if let Some(subscriber) = &*self.subscriber.load() {
            subscriber.fault(event);
        }
    }

    pub(crate) fn register_vcpu(&self, stats: &Arc<VcpuStats>) {
        totals::register(stats);
        let mut vcpus = lock(&self.vcpus);
        vcpus.retain(|v| Arc::strong_count(v) > 1);
        vcpus.push(Arc::clone(stats));
    }

    pub(crate) fn register_ring(&self, ring: &SharedRing) {
        let mut rings = lock(&self.rings);
        rings.retain(|r| Arc::strong_count(r) > 1);
        rings.push(Arc::clone(ring));
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
