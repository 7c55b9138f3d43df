//! A vCPU: the CPU, what KVM keeps beside it, and the `kvm_run` page.
//!
//! [`Vcpu`]'s lock is the kernel's `vcpu->mutex`: every call takes it, and `KVM_RUN` holds it while
//! it runs. What others may do meanwhile (kick, raise an interrupt, set `immediate_exit`) goes by
//! [`Kicker`], the local APIC and [`RunPage`], which need no lock.
//!
//! | file            | calls                                                     |
//! |-----------------|-----------------------------------------------------------|
//! | `regs`          | general and special registers                             |
//! | `fpu`           | x87, SSE, AVX, XCR0                                       |
//! | `debug`         | debug registers, guest debugging                          |
//! | `events`        | pending events, injection                                 |
//! | `mp`, `apic`    | INIT and SIPI, the local APIC                             |
//! | `cpuid`, `msrs` | CPUID, MSRs, clocks                                       |
//! | `nested`        | the state of a CPU without nested virtualisation          |
//! | `run`           | `KVM_RUN`                                                 |
//! | `halt`          | sleeping                                                  |
//! | `vapic`         | what guest and local APIC share in memory                 |

mod apic;
mod control;
mod core;
mod cpuid;
mod debug;
mod events;
mod exit;
mod fpu;
mod halt;
mod kick;
mod machine;
mod mp;
mod msrs;
pub(crate) mod nested;
mod platform;
mod regs;
mod reset;
mod run;
mod run_page;
mod segments;
mod signal;
mod translate;
mod vapic;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED};

pub(crate) use control::{EFER_KNOWN, efer_is_valid};
pub(crate) use machine::Machine;
pub(crate) use nested::largest as largest_nested_state;

pub use kick::Kicker;
pub use run_page::{COALESCED_OFFSET, MMAP_SIZE, PORT_DATA_OFFSET, RunPage};

use self::core::Core;
use crate::clock::monotonic_ns;
use crate::clock::time::{GuestTsc, Now, TimeSource};
use crate::cpuid::Cpuid;
use crate::errno::Errno;
use crate::irqchip::apic::{DEFAULT_BASE, Lapic, Role};
use crate::irqchip::wake::VcpuWake;
use crate::stats::{Counters, StatsFile};
use crate::vm::Shared;

const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_BSP: u64 = 1 << 8;

/// One vCPU.
pub struct Vcpu {
    id: u32,
    vm: Arc<Shared>,
    run: Arc<RunPage>,
    kicker: Arc<Kicker>,
    lapic: Option<Arc<Lapic>>,
    /// The guest's TSC, for those who need it without the lock.
    tsc: Arc<GuestTsc>,
    stats: StatsFile,
    counters: Arc<Counters>,
    inner: Mutex<Inner>,
}

/// What the vCPU's lock guards.
pub(crate) struct Inner {
    pub(crate) core: Core,
    pub(crate) machine: Machine,
}

/// What the local APIC's timer goes by.
struct VcpuTime(Arc<GuestTsc>);

impl TimeSource for VcpuTime {
    fn now(&self) -> Now {
        Now {
            ns: monotonic_ns(),
            tsc: self.0.read(),
            tsc_khz: self.0.khz(),
        }
    }
}

/// The local APIC, where the VM has them.
fn add_lapic(
    vm: &Shared,
    id: u32,
    kicker: &Arc<Kicker>,
    tsc: &Arc<GuestTsc>,
) -> Option<Arc<Lapic>> {
    let role = if vm.boot_id() == id {
        Role::Bootstrap
    } else {
        Role::Application
    };
    let wake = Arc::clone(kicker) as Arc<dyn VcpuWake>;
    let time = Arc::new(VcpuTime(Arc::clone(tsc)));
    vm.irqchip().add_vcpu(id, role, wake, time)
}

impl Vcpu {
    /// A vCPU after a reset. The caller has checked the id.
    pub(crate) fn new(vm: &Arc<Shared>, id: u32) -> Result<Self, Errno> {
        let run = Arc::new(RunPage::new(vm.slots().dirty_ring_bytes())?);
        let kicker = Arc::new(Kicker::default());
        let tsc = Arc::new(GuestTsc::new(vm.tsc_khz()));
        let bootstrap = vm.boot_id() == id;
        let lapic = add_lapic(vm, id, &kicker, &tsc);
        let mut core = Core::new(cpuid::offer(&Cpuid::default()));
        reset::reset(core.state_mut(), reset::Cause::Reset, None);
        let bsp = if bootstrap { APIC_BASE_BSP } else { 0 };
        let apic_base = DEFAULT_BASE | APIC_BASE_ENABLE | bsp;
        let mut machine = Machine::new(apic_base, vm.tsc_khz());
        machine.mp_state = if lapic.is_none() || bootstrap {
            KVM_MP_STATE_RUNNABLE
        } else {
            KVM_MP_STATE_UNINITIALIZED
        };
        let vcpu = Self {
            id,
            vm: Arc::clone(vm),
            run,
            kicker,
            lapic,
            tsc,
            stats: StatsFile::default(),
            counters: Arc::default(),
            inner: Mutex::new(Inner { core, machine }),
        };
        vcpu.start_tsc();
        Ok(vcpu)
    }

    fn start_tsc(&self) {
        let mut inner = self.lock();
        let khz = inner.machine.tsc_khz;
        // The VM has checked it.
        let _ = self.adopt_tsc_khz(&mut inner, khz);
        let offset = self.synchronize_tsc(None);
        inner.core.state_mut().tsc_offset = offset;
        self.publish_tsc(offset);
    }

    /// Its id, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The `kvm_run` page.
    pub fn run_page(&self) -> &Arc<RunPage> {
        &self.run
    }

    /// The way to its thread.
    pub fn kicker(&self) -> &Arc<Kicker> {
        &self.kicker
    }

    /// The file of its counters.
    pub(crate) fn stats(&self) -> &StatsFile {
        &self.stats
    }

    /// What its run loop has met.
    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The guest's TSC.
    pub(crate) fn tsc(&self) -> &GuestTsc {
        &self.tsc
    }

    /// What it shares with the VM's other vCPUs.
    pub fn vm(&self) -> &Shared {
        &self.vm
    }

    pub(crate) fn lapic(&self) -> Option<&Arc<Lapic>> {
        self.lapic.as_ref()
    }

    pub(crate) fn is_bootstrap(&self) -> bool {
        self.apic_base_register() & APIC_BASE_BSP != 0
    }

    fn apic_base_register(&self) -> u64 {
        match &self.lapic {
            Some(lapic) => lapic.base(),
            None if self.vm.boot_id() == self.id => APIC_BASE_BSP,
            None => 0,
        }
    }

    /// Whether nobody has the vCPU's lock at this moment.
    pub(crate) fn is_free(&self) -> bool {
        !matches!(self.inner.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// The vCPU's lock. A panic of another thread in it says nothing about the state.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
