//! A virtual machine: memory slots, interrupt controllers, clocks, vCPUs.
//!
//! [`Vm`] is what a VM's file descriptor stands for and owns the vCPUs; [`Shared`] is what the vCPUs
//! need of it, and lives as long as any of them, as a VM in the kernel outlives its descriptor.
//!
//! Lock order: a vCPU's lock, then any lock here; the locks here are leaves. Only the slots' writer
//! waits for vCPUs ([`::memory::quiesce`]), and holds no other lock.

mod capability;
mod clock;
mod hold;
mod interrupts;
mod memory;
mod protected;
mod tsc;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use ::memory::quiesce::Domain;
use ::memory::slot::{Slots, SlotsConfig};
use addr::Hva;
use arc_swap::ArcSwapOption;
use kvm_bindings::kvm_msr_filter;

pub use hold::{Hold, StillRuns};
pub use tsc::host_tsc_khz;
pub(crate) use tsc::{possible_khz, scaling};

use crate::clock::kvmclock::KvmClock;
use crate::device::Devices;
use crate::errno::Errno;
use crate::irqchip::chip::{Irqchip, Vcpus};
use crate::msr::filter::{Access, MsrFilter};
use crate::stats::StatsFile;
use crate::system::Settings;
use crate::table::{MAX_VCPU_IDS, MAX_VCPUS};
use crate::vcpu::{RunPage, Vcpu};
use cpu::CodeMap;
use mmu::{Mmu, MmuConfig, PagingPath};

use protected::Protected;
use tsc::TscLine;

/// One address space: there is no system management mode.
const SLOTS: SlotsConfig = SlotsConfig {
    address_spaces: 1,
    physical_bits: 52,
    host_end: Hva::new(0x7fff_ffff_f000),
};

/// VMs made so far.
static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Capabilities that change what vCPUs show of their events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `KVM_CAP_EXCEPTION_PAYLOAD`.
    pub exception_payload: bool,
    /// `KVM_CAP_X86_TRIPLE_FAULT_EVENT`.
    pub triple_fault_event: bool,
}

/// The type of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `KVM_X86_DEFAULT_VM`.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`.
    Protected,
}

/// What vCPUs need of their VM.
pub struct Shared {
    /// The process that made it, as `fork` counts them.
    generation: u32,
    /// How many were made before it.
    serial: u64,
    /// HLT was taken from the exits: the guest gets no `PV_UNHALT`.
    halts_in_guest: AtomicBool,
    /// The longest that a halted vCPU polls, in nanoseconds.
    halt_poll_ns: AtomicU32,
    /// How many hold the vCPUs.
    holds: AtomicUsize,
    settings: Settings,
    slots: Arc<Slots>,
    domain: Arc<Domain>,
    mmu: Arc<Mmu>,
    code: Arc<CodeMap>,
    clock: KvmClock,
    /// Grows with every `KVM_SET_CLOCK`.
    clock_generation: AtomicU64,
    irqchip: Irqchip,
    /// The first vCPU's pages, whose ring of coalesced writes is the VM's.
    coalesced: OnceLock<Arc<RunPage>>,
    exception_payload: AtomicBool,
    triple_fault_event: AtomicBool,
    platform_info: AtomicBool,
    exit_on_emulation_failure: AtomicBool,
    /// `KVM_CAP_X86_USER_SPACE_MSR`.
    msr_exits: AtomicU32,
    /// `KVM_CAP_EXIT_HYPERCALL`.
    hypercall_exits: AtomicU64,
    msr_filter: ArcSwapOption<MsrFilter>,
    boot_id: AtomicU32,
    wall_clock: AtomicU64,
    devices: Devices,
    stats: StatsFile,
    tsc: Mutex<TscLine>,
    tsc_khz: AtomicU32,
    /// The slots of a protected VM.
    protected: Option<Protected>,
}

/// What a change of the VM's shape looks at.
#[derive(Default)]
struct Shape {
    vcpus: Vec<Arc<Vcpu>>,
    /// Ids are below this, once it is set.
    id_limit: Option<u32>,
}

/// A virtual machine.
pub struct Vm {
    shared: Arc<Shared>,
    shape: RwLock<Shape>,
    quirks: AtomicU64,
}

impl Shared {
    fn new(settings: Settings, kind: Kind) -> Result<Self, Errno> {
        let domain = Domain::new();
        let khz = host_tsc_khz();
        let slots = Slots::new(Arc::clone(&domain), SLOTS);
        Ok(Self {
            generation: crate::fds::generation(),
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            halts_in_guest: AtomicBool::new(false),
            halt_poll_ns: AtomicU32::new(0),
            holds: AtomicUsize::new(0),
            settings,
            mmu: Mmu::new(
                &slots,
                MmuConfig {
                    path: settings.paging,
                    large_pages: settings.large_pages,
                    ..MmuConfig::default()
                },
            ),
            code: Arc::default(),
            clock: KvmClock::new(khz),
            clock_generation: AtomicU64::new(0),
            slots,
            domain,
            irqchip: Irqchip::new()?,
            coalesced: OnceLock::new(),
            exception_payload: AtomicBool::new(false),
            triple_fault_event: AtomicBool::new(false),
            platform_info: AtomicBool::new(true),
            exit_on_emulation_failure: AtomicBool::new(false),
            msr_exits: AtomicU32::new(0),
            hypercall_exits: AtomicU64::new(0),
            msr_filter: ArcSwapOption::empty(),
            boot_id: AtomicU32::new(0),
            wall_clock: AtomicU64::new(0),
            devices: Devices::default(),
            stats: StatsFile::default(),
            tsc: Mutex::default(),
            tsc_khz: AtomicU32::new(khz),
            protected: (kind == Kind::Protected).then(Protected::default),
        })
    }

    /// The process that made it.
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// How many VMs this process made before it.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Whether the guest's HLT is its own affair.
    pub(crate) fn halts_in_guest(&self) -> bool {
        self.halts_in_guest.load(Ordering::Relaxed)
    }

    /// The longest that a halted vCPU polls before it sleeps.
    pub(crate) fn halt_poll(&self) -> Duration {
        Duration::from_nanos(self.halt_poll_ns.load(Ordering::Relaxed).into())
    }

    /// What was chosen for it.
    pub(crate) fn settings(&self) -> Settings {
        self.settings
    }

    /// The tables between guest and host addresses.
    pub fn paging(&self) -> PagingPath {
        self.settings.paging
    }

    /// The MMU.
    pub fn mmu(&self) -> &Arc<Mmu> {
        &self.mmu
    }

    /// Which guest memory holds translated code.
    pub(crate) fn code(&self) -> &Arc<CodeMap> {
        &self.code
    }

    /// The memory slots.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Where writers wait for vCPUs.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// The file of its counters.
    pub(crate) fn stats(&self) -> &StatsFile {
        &self.stats
    }

    /// The devices of `KVM_CREATE_DEVICE`.
    pub(crate) fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The interrupt controllers, and everything else that interrupts.
    pub fn irqchip(&self) -> &Irqchip {
        &self.irqchip
    }

    /// Capabilities that change what vCPUs show.
    pub fn features(&self) -> Features {
        Features {
            exception_payload: self.exception_payload.load(Ordering::Relaxed),
            triple_fault_event: self.triple_fault_event.load(Ordering::Relaxed),
        }
    }

    /// The id of the bootstrap processor.
    pub fn boot_id(&self) -> u32 {
        self.boot_id.load(Ordering::Relaxed)
    }

    /// Whether the guest may read `IA32_PLATFORM_INFO`.
    pub fn reads_platform_info(&self) -> bool {
        self.platform_info.load(Ordering::Relaxed)
    }

    /// Whether an instruction that can't be run always leaves for the monitor.
    pub fn exits_on_emulation_failure(&self) -> bool {
        self.exit_on_emulation_failure.load(Ordering::Relaxed)
    }

    /// Which refused MSR accesses leave for the monitor (`KVM_MSR_EXIT_REASON_*`).
    pub fn msr_exits(&self) -> u32 {
        self.msr_exits.load(Ordering::Relaxed)
    }

    /// Whether a hypercall leaves for the monitor.
    pub fn hypercall_exits(&self, nr: u64) -> bool {
        nr < 64 && self.hypercall_exits.load(Ordering::Relaxed) >> nr & 1 != 0
    }

    /// Whether the filter lets the guest reach an MSR.
    pub fn allows_msr(&self, index: u32, access: Access) -> bool {
        let filter = self.msr_filter.load();
        filter.as_ref().is_none_or(|f| f.allows(index, access))
    }

    /// Takes the first vCPU's ring for the VM's coalesced writes.
    fn coalesce_into(&self, pages: &Arc<RunPage>) {
        if self.coalesced.set(Arc::clone(pages)).is_err() {
            return;
        }
        give_ring(&self.irqchip, pages);
    }
}

#[expect(unsafe_code, reason = "the ring is memory that the program shares")]
fn give_ring(irqchip: &Irqchip, pages: &Arc<RunPage>) {
    // SAFETY: `Shared` keeps the pages as long as the controllers.
    unsafe { irqchip.zones().ring().set_page(pages.coalesced_ring()) };
}

fn read(shape: &RwLock<Shape>) -> std::sync::RwLockReadGuard<'_, Shape> {
    shape.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(shape: &RwLock<Shape>) -> std::sync::RwLockWriteGuard<'_, Shape> {
    shape.write().unwrap_or_else(PoisonError::into_inner)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    /// A VM without memory and vCPUs.
    pub(crate) fn new(settings: Settings, kind: Kind) -> Result<Self, Errno> {
        Ok(Self {
            shared: Arc::new(Shared::new(settings, kind)?),
            shape: RwLock::default(),
            quirks: AtomicU64::new(0),
        })
    }

    /// Whether its memory may be private.
    pub fn is_protected(&self) -> bool {
        self.shared.protected.is_some()
    }

    /// What it shares with its vCPUs.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// `KVM_CREATE_VCPU`.
    pub fn create_vcpu(&self, id: u64) -> Result<Arc<Vcpu>, Errno> {
        let id = u32::try_from(id).map_err(|_| Errno::EINVAL)?;
        let mut shape = write(&self.shape);
        let limit = *shape.id_limit.get_or_insert(MAX_VCPU_IDS);
        if id >= limit || shape.vcpus.len() >= MAX_VCPUS as usize {
            return Err(Errno::EINVAL);
        }
        if shape.vcpus.iter().any(|vcpu| vcpu.id() == id) {
            return Err(Errno::EEXIST);
        }
        let vcpu = Arc::new(Vcpu::new(&self.shared, id)?);
        if shape.vcpus.is_empty() {
            self.shared.coalesce_into(vcpu.run_page());
        }
        shape.vcpus.push(Arc::clone(&vcpu));
        Ok(vcpu)
    }

    /// Changes something that must be settled before there are vCPUs.
    fn locked_without_vcpus<T>(&self, change: impl FnOnce() -> T) -> Result<T, Errno> {
        let shape = write(&self.shape);
        if shape.vcpus.is_empty() {
            Ok(change())
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn population(shape: &Shape) -> Vcpus {
        if shape.vcpus.is_empty() {
            Vcpus::None
        } else {
            Vcpus::Some
        }
    }

    /// Its vCPUs, in the order of their creation.
    pub fn vcpus(&self) -> Vec<Arc<Vcpu>> {
        read(&self.shape).vcpus.clone()
    }

    /// `KVM_SET_BOOT_CPU_ID`.
    pub fn set_boot_cpu_id(&self, id: u64) -> Result<(), Errno> {
        let shape = write(&self.shape);
        if !shape.vcpus.is_empty() {
            return Err(Errno::EBUSY);
        }
        let limit = u64::from(MAX_VCPU_IDS);
        let own_limit = shape.id_limit.map_or(limit, u64::from);
        if id > limit || id > own_limit {
            return Err(Errno::EINVAL);
        }
        self.shared.boot_id.store(id as u32, Ordering::Relaxed);
        Ok(())
    }

    /// `KVM_X86_SET_MSR_FILTER`.
    pub fn set_msr_filter(&self, filter: &kvm_msr_filter) -> Result<(), Errno> {
        let filter = MsrFilter::new(filter)?;
        self.shared.msr_filter.store(Some(Arc::new(filter)));
        Ok(())
    }
}
