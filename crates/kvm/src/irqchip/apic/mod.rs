//! One vCPU's local APIC, xAPIC and x2APIC (SDM 3A, chapter 12).
//!
//! ```text
//!   other vCPUs, IOAPIC, MSI            timer thread
//!            │ accept(message)                │ timer_fired()
//!            ▼                                ▼
//!   IRR |= vector ─► wake.interrupt()   pending = true ─► wake.interrupt()
//!   ─────────────────────────────────────────────────────── any thread above, vCPU thread below
//!   has_interrupt(): PPR < highest IRR?      acknowledge(): IRR → ISR      write(EOI): ISR → ∅
//! ```
//!
//! A [`Lapic`] knows nothing of other controllers: what a register write means to them comes back
//! as [`Effects`], which the VM's interrupt chip carries out. Methods that say "any thread"
//! take no lock; all others belong to the vCPU's thread, or to an ioctl that holds the vCPU.
//!
//! | state                | written by            | read by       |
//! |----------------------|-----------------------|---------------|
//! | IRR, TMR             | any thread (atomic)   | vCPU's thread |
//! | other registers      | vCPU's thread         | any thread    |
//! | INIT, SIPI, NMIs     | any thread (atomic)   | vCPU's thread |
//! | timer                | vCPU's, timer thread  | both (mutex)  |

mod access;
mod base;
mod priority;
pub mod registers;
mod snapshot;
#[cfg(test)]
mod tests;
pub mod timer;

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::time::{Now, TimeSource};

use super::message::{DeliveryMode, Level, Message, Trigger};
use super::policy::Policy;
use super::wake::{HaltGate, VcpuWake, Woken};
pub use access::Refused;
pub use base::{ApicMode, BaseWriter, DEFAULT_BASE, check_base};
use registers::{RegisterPage, lvt, reg};
use timer::Timer;

/// How a timer asks for a call at a time of the host's monotonic clock.
pub trait Alarm: Send + Sync {
    /// Replaces the alarm; `None` takes it back (it may still go off once).
    fn set(&self, at: Option<u64>);
}

/// Whether a vCPU starts the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The bootstrap processor.
    Bootstrap,
    /// Waits for INIT and SIPI.
    Application,
}

/// The two resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Power on: the APIC base too.
    Power,
    /// INIT: the APIC base and the ID stay.
    Init,
}

/// An interrupt that was ended by its EOI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndOfInterrupt {
    /// Its vector.
    pub vector: u8,
    /// How it came.
    pub trigger: Trigger,
}

/// What a register access means to the rest of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Send this.
    pub ipi: Option<Message>,
    /// Tell the IOAPIC, if it cares for this vector.
    pub eoi: Option<EndOfInterrupt>,
    /// An ID, a mode or an enable bit has changed: how messages find their targets is stale.
    pub addressing_changed: bool,
}

impl Effects {
    const NONE: Effects = Effects {
        ipi: None,
        eoi: None,
        addressing_changed: false,
    };
    const ADDRESSING: Effects = Effects {
        addressing_changed: true,
        ..Effects::NONE
    };
}

/// What CPUID and `MCG_CAP` say about this APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApicFeatures {
    /// `CPUID.1:ECX.x2APIC`.
    pub x2apic: bool,
    /// `CPUID.1:ECX.TSC_Deadline`.
    pub tsc_deadline: bool,
    /// Bits of physical addresses.
    pub physical_bits: u8,
}

/// What a [`Lapic`] needs at birth.
pub struct LapicConfig {
    /// The vCPU's ID, which is the x2APIC ID.
    pub id: u32,
    /// Bootstrap or application processor.
    pub role: Role,
    /// VM-wide rules.
    pub policy: Arc<Policy>,
    /// The way to the vCPU's thread.
    pub wake: Arc<dyn VcpuWake>,
    /// The vCPU's clock.
    pub time: Arc<dyn TimeSource>,
    /// The host's timer.
    pub alarm: Arc<dyn Alarm>,
}

const EVENT_INIT: u8 = 1;
const EVENT_SIPI: u8 = 2;

/// One local APIC.
pub struct Lapic {
    id: u32,
    role: Role,
    policy: Arc<Policy>,
    wake: Arc<dyn VcpuWake>,
    time: Arc<dyn TimeSource>,
    alarm: Arc<dyn Alarm>,
    page: RegisterPage,
    base: AtomicU64,
    lvt_entries: AtomicU8,
    /// The timer mode bits that this CPU has; none before CPUID is set.
    timer_mode_mask: AtomicU32,
    x2apic_allowed: AtomicBool,
    physical_bits: AtomicU8,
    timer: Mutex<Timer>,
    /// A copy of [`Timer::is_pending`] that is read without the lock.
    timer_pending: AtomicBool,
    events: AtomicU8,
    sipi_vector: AtomicU8,
    nmis: AtomicU32,
    unhalted: AtomicBool,
    /// Interrupts of lowest priority that were taken, for arbitration.
    arbitration: AtomicI32,
    /// The vectors whose EOI the IOAPIC wants.
    eoi_interest: [AtomicU64; 4],
    eoi_interest_stale: AtomicBool,
    /// With the split chip: an EOI for the monitor, or -1.
    eoi_exit: AtomicI32,
    /// With the split chip: the vector of `KVM_INTERRUPT`, or -1.
    external_vector: AtomicI32,
}

impl Lapic {
    /// The APIC of a new vCPU, after a power-on reset.
    pub fn new(config: LapicConfig) -> Lapic {
        let lapic = Lapic {
            timer: Mutex::new(Timer::new(config.policy.bus_cycle_ns())),
            id: config.id,
            role: config.role,
            policy: config.policy,
            wake: config.wake,
            time: config.time,
            alarm: config.alarm,
            page: RegisterPage::default(),
            base: AtomicU64::new(0),
            lvt_entries: AtomicU8::new(registers::MAX_LVT_ENTRIES - 1),
            timer_mode_mask: AtomicU32::new(0),
            x2apic_allowed: AtomicBool::new(false),
            physical_bits: AtomicU8::new(36),
            timer_pending: AtomicBool::new(false),
            events: AtomicU8::new(0),
            sipi_vector: AtomicU8::new(0),
            nmis: AtomicU32::new(0),
            unhalted: AtomicBool::new(false),
            arbitration: AtomicI32::new(0),
            eoi_interest: Default::default(),
            eoi_interest_stale: AtomicBool::new(true),
            eoi_exit: AtomicI32::new(-1),
            external_vector: AtomicI32::new(-1),
        };
        lapic.reset(Reset::Power);
        lapic
    }

    /// The vCPU's ID, which is the x2APIC ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The ID that xAPIC mode shows (it can be written there).
    pub fn xapic_id(&self) -> u32 {
        self.page.get(reg::ID) >> 24
    }

    /// The raw register at `offset`. Any thread.
    pub fn register(&self, offset: u32) -> u32 {
        self.page.get(offset)
    }

    /// Whether the spurious-vector register enables it.
    pub fn is_software_enabled(&self) -> bool {
        self.page.get(reg::SPIV) & registers::SPIV_ENABLED != 0
    }

    /// Whether its EOIs stay its own, for a guest that writes the IOAPIC's EOI register.
    pub fn has_directed_eoi(&self) -> bool {
        self.page.get(reg::SPIV) & registers::SPIV_DIRECTED_EOI != 0
    }

    /// Whether it takes ordinary interrupts.
    pub fn is_enabled(&self) -> bool {
        self.is_software_enabled() && self.is_hardware_enabled()
    }

    /// CPUID was set.
    pub fn set_features(&self, features: ApicFeatures) {
        let modes = if features.tsc_deadline {
            3 << 17
        } else {
            lvt::TIMER_PERIODIC
        };
        self.timer_mode_mask.store(modes, Ordering::Relaxed);
        self.x2apic_allowed
            .store(features.x2apic, Ordering::Relaxed);
        self.physical_bits
            .store(features.physical_bits, Ordering::Relaxed);
        self.set_version();
    }

    /// What [`Self::set_features`] said.
    pub fn features(&self) -> ApicFeatures {
        ApicFeatures {
            x2apic: self.x2apic_allowed.load(Ordering::Relaxed),
            tsc_deadline: self.timer_mode_mask.load(Ordering::Relaxed) == 3 << 17,
            physical_bits: self.physical_bits.load(Ordering::Relaxed),
        }
    }

    /// Whether there is an LVT entry for corrected machine checks (`MCG_CAP`).
    pub fn set_cmci(&self, cmci: Cmci) {
        let entries = match cmci {
            Cmci::Present => registers::MAX_LVT_ENTRIES,
            Cmci::Absent => registers::MAX_LVT_ENTRIES - 1,
        };
        if self.lvt_entries.swap(entries, Ordering::Relaxed) == entries {
            return;
        }
        if cmci == Cmci::Present {
            self.page.set(reg::LVTCMCI, lvt::MASKED);
        }
        self.set_version();
    }

    /// The wake path of this vCPU. Any thread.
    pub fn wake(&self) -> &dyn VcpuWake {
        &*self.wake
    }

    /// Takes one interrupt from the APIC bus or a local source. Any thread; no lock.
    ///
    /// Answers whether it was taken; a vector that was already requested counts as taken.
    pub fn accept(&self, message: &Message) -> bool {
        match message.delivery {
            DeliveryMode::LowestPriority => {
                self.arbitration.fetch_add(1, Ordering::Relaxed);
                self.accept_fixed(message)
            }
            DeliveryMode::Fixed => self.accept_fixed(message),
            DeliveryMode::RemoteRead => {
                self.unhalted.store(true, Ordering::SeqCst);
                self.wake.request();
                true
            }
            DeliveryMode::Nmi => {
                self.inject_nmi();
                true
            }
            DeliveryMode::Init => self.accept_init(message),
            DeliveryMode::Startup => {
                self.sipi_vector.store(message.vector, Ordering::SeqCst);
                self.events.fetch_or(EVENT_SIPI, Ordering::SeqCst);
                self.wake.request();
                true
            }
            // There is no SMM here; and a vector from the 8259 is fetched, not sent.
            DeliveryMode::Smi | DeliveryMode::ExtInt => false,
        }
    }

    fn accept_fixed(&self, message: &Message) -> bool {
        let level = message.trigger == Trigger::Level;
        if (level && message.level == Level::Deassert) || !self.is_enabled() {
            return false;
        }
        let vector = message.vector;
        if self.page.test(reg::TMR, vector) != level {
            if level {
                self.page.set_vector(reg::TMR, vector);
            } else {
                self.page.clear_vector(reg::TMR, vector);
            }
        }
        self.page.set_vector(reg::IRR, vector);
        self.wake.interrupt();
        true
    }

    fn accept_init(&self, message: &Message) -> bool {
        if message.trigger == Trigger::Level && message.level == Level::Deassert {
            return false;
        }
        // An INIT drops a SIPI that came before it.
        self.events.store(EVENT_INIT, Ordering::SeqCst);
        self.wake.request();
        true
    }

    /// One more NMI. Any thread.
    pub fn inject_nmi(&self) {
        self.nmis.fetch_add(1, Ordering::SeqCst);
        self.wake.request();
    }

    /// The NMIs that arrived since the last call.
    pub fn take_nmis(&self) -> u32 {
        self.nmis.swap(0, Ordering::SeqCst)
    }

    /// Whether there are NMIs to take.
    pub fn has_nmis(&self) -> bool {
        self.nmis.load(Ordering::SeqCst) != 0
    }

    /// Takes `KVM_HC_KICK_CPU`'s unhalt.
    pub fn take_unhalt(&self) -> bool {
        self.unhalted.swap(false, Ordering::SeqCst)
    }

    /// Whether there is an unhalt to take.
    pub fn is_unhalted(&self) -> bool {
        self.unhalted.load(Ordering::SeqCst)
    }

    /// Whether INIT or SIPI wait to be taken.
    pub fn has_startup_events(&self) -> bool {
        self.events.load(Ordering::SeqCst) != 0
    }

    /// Takes a waiting INIT. The run loop then resets the vCPU, this APIC with [`Reset::Init`].
    pub fn take_init(&self) -> bool {
        self.events.fetch_and(!EVENT_INIT, Ordering::SeqCst) & EVENT_INIT != 0
    }

    /// Takes a waiting SIPI: its vector, which means something only to a vCPU in
    /// `KVM_MP_STATE_INIT_RECEIVED`.
    pub fn take_sipi(&self) -> Option<u8> {
        let taken = self.events.fetch_and(!EVENT_SIPI, Ordering::SeqCst) & EVENT_SIPI != 0;
        taken.then(|| self.sipi_vector.load(Ordering::SeqCst))
    }

    /// The vector of a SIPI that waits or was the last one (`kvm_vcpu_events.sipi_vector`).
    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::SeqCst)
    }

    /// Whether an INIT waits (`kvm_vcpu_events.smi.latched_init`).
    pub fn has_init(&self) -> bool {
        self.events.load(Ordering::SeqCst) & EVENT_INIT != 0
    }

    /// Makes an INIT wait, or none (`KVM_SET_VCPU_EVENTS`).
    pub fn set_init(&self, level: Level) {
        match level {
            Level::Assert => self.events.fetch_or(EVENT_INIT, Ordering::SeqCst),
            Level::Deassert => self.events.fetch_and(!EVENT_INIT, Ordering::SeqCst),
        };
    }

    /// The vector of a SIPI to come (`KVM_SET_VCPU_EVENTS`).
    pub fn set_sipi_vector(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::SeqCst);
    }

    /// `KVM_SET_MP_STATE(SIPI_RECEIVED)`.
    pub fn set_sipi(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::SeqCst);
        self.events.fetch_or(EVENT_SIPI, Ordering::SeqCst);
    }

    /// Delivers a local interrupt (`reg::LVTT`, `reg::LVT0`, ...) as its LVT entry says.
    pub fn deliver_local(&self, register: u32) -> bool {
        let entry = self.page.get(register);
        if !self.is_hardware_enabled() || entry & lvt::MASKED != 0 {
            return false;
        }
        self.accept(&Message {
            delivery: DeliveryMode::from_bits(entry >> 8),
            trigger: if entry & lvt::LEVEL != 0 {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            ..Message::fixed(entry as u8, self.id)
        })
    }

    /// Whether the 8259's INTR reaches this CPU (virtual wire mode).
    pub fn accepts_pic(&self) -> bool {
        !self.is_hardware_enabled()
            || self.page.get(reg::LVT0) & (lvt::MASKED | lvt::MODE) == lvt::MODE_EXTINT
    }

    /// Whether LVT0 sends the PIT's ticks as NMIs (Linux's old NMI watchdog).
    pub fn has_nmi_watchdog(&self) -> bool {
        self.page.get(reg::LVT0) & (lvt::MASKED | lvt::MODE) == lvt::MODE_NMI
    }

    /// The arbitration count: the lower, the sooner it gets an interrupt of lowest priority.
    pub fn arbitration(&self) -> i32 {
        self.arbitration.load(Ordering::Relaxed)
    }

    /// `KVM_INTERRUPT` with the split chip: refused while one waits.
    pub fn set_external_vector(&self, vector: u8) -> bool {
        let exchange = self.external_vector.compare_exchange(
            -1,
            i32::from(vector),
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        if exchange.is_ok() {
            self.wake.interrupt();
        }
        exchange.is_ok()
    }

    /// Whether a vector of `KVM_INTERRUPT` waits.
    pub fn has_external_vector(&self) -> bool {
        self.external_vector.load(Ordering::SeqCst) >= 0
    }

    /// Takes the vector of `KVM_INTERRUPT`.
    pub fn take_external_vector(&self) -> Option<u8> {
        u8::try_from(self.external_vector.swap(-1, Ordering::SeqCst)).ok()
    }

    fn timer_lock(&self) -> MutexGuard<'_, Timer> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the timer, then sets the host's alarm to what the timer wants.
    fn with_timer<R>(&self, change: impl FnOnce(&mut Timer, Now) -> R) -> R {
        let now = self.time.now();
        let mut timer = self.timer_lock();
        let before = timer.alarm();
        let result = change(&mut timer, now);
        self.timer_pending
            .store(timer.is_pending(), Ordering::SeqCst);
        if timer.alarm() != before {
            self.alarm.set(timer.alarm());
        }
        result
    }

    /// The host's alarm has gone off. Any thread.
    pub fn timer_fired(&self) {
        if self.with_timer(Timer::fire) {
            self.wake.interrupt();
        }
    }

    /// Sleeps in `gate`, which the caller has shut, until somebody opens it or the timer expires.
    ///
    /// The sleeper is its own alarm clock meanwhile: an expiry then costs one wake-up and not two,
    /// that of the thread which keeps the host's timers and that of the vCPU.
    pub fn sleep(&self, gate: &HaltGate) -> Woken {
        let alarm = {
            let timer = self.timer_lock();
            if timer.alarm().is_some() {
                self.alarm.set(None);
            }
            timer.alarm()
        };
        let now = self.time.now().ns;
        let woken = gate.wait(alarm.map(|at| Duration::from_nanos(at.saturating_sub(now))));
        if alarm.is_some() {
            self.with_timer(Timer::fire);
            let timer = self.timer_lock();
            self.alarm.set(timer.alarm());
        }
        woken
    }

    /// When the timer will expire, on the monotonic clock. Any thread.
    pub fn next_alarm(&self) -> Option<u64> {
        self.timer_lock().alarm()
    }

    /// Whether an expired timer waits to become an interrupt.
    pub fn has_pending_timer(&self) -> bool {
        self.timer_pending.load(Ordering::SeqCst)
            && self.is_enabled()
            && self.page.get(reg::LVTT) & lvt::MASKED == 0
    }

    /// Turns an expired timer into an interrupt; part of every entry into the guest.
    pub fn inject_pending_timer(&self) {
        if self.has_pending_timer() {
            self.deliver_local(reg::LVTT);
            self.with_timer(|timer, _| timer.acknowledge());
        }
    }

    /// `IA32_TSC_DEADLINE`.
    pub fn tsc_deadline(&self) -> u64 {
        if self.is_hardware_enabled() {
            self.timer_lock().tsc_deadline()
        } else {
            0
        }
    }

    /// Writes `IA32_TSC_DEADLINE`; without effect outside TSC-deadline mode.
    pub fn set_tsc_deadline(&self, deadline: u64) {
        if !self.is_hardware_enabled() {
            return;
        }
        self.with_timer(|timer, now| {
            if timer.mode() == timer::Mode::TscDeadline {
                timer.set_tsc_deadline(deadline, now);
            }
        });
        self.notice_interrupt();
    }

    /// Sees to it that the vCPU looks at its interrupts if there may be one now.
    fn notice_interrupt(&self) {
        if self.has_pending_timer() || self.has_interrupt().is_some() {
            self.wake.interrupt();
        }
    }

    /// Forgets which EOIs the IOAPIC wants: its table or an address has changed. Any thread.
    pub fn invalidate_eoi_interest(&self) {
        self.eoi_interest_stale.store(true, Ordering::SeqCst);
    }

    /// Whether [`Self::set_eoi_interest`] must be called before an EOI.
    pub fn is_eoi_interest_stale(&self) -> bool {
        self.eoi_interest_stale.load(Ordering::SeqCst)
    }

    /// The vectors whose EOI the IOAPIC wants, computed by `compute`.
    pub fn set_eoi_interest(&self, compute: impl FnOnce(&mut VectorSet)) {
        // Cleared first: a change during the computation makes it stale again.
        self.eoi_interest_stale.store(false, Ordering::SeqCst);
        let mut set = VectorSet::default();
        compute(&mut set);
        for (word, value) in self.eoi_interest.iter().zip(set.0) {
            word.store(value, Ordering::SeqCst);
        }
    }

    /// Whether the IOAPIC wants this vector's EOI.
    pub fn wants_eoi(&self, vector: u8) -> bool {
        let word = &self.eoi_interest[usize::from(vector / 64)];
        word.load(Ordering::SeqCst) & (1 << (vector % 64)) != 0
    }

    /// With the split chip: an EOI that the monitor must see.
    pub fn post_eoi_exit(&self, vector: u8) {
        self.eoi_exit.store(i32::from(vector), Ordering::SeqCst);
        self.wake.request();
    }

    /// Takes the EOI that the monitor must see (`KVM_EXIT_IOAPIC_EOI`).
    pub fn take_eoi_exit(&self) -> Option<u8> {
        u8::try_from(self.eoi_exit.swap(-1, Ordering::SeqCst)).ok()
    }

    /// Whether there is an EOI that the monitor must see.
    pub fn has_eoi_exit(&self) -> bool {
        self.eoi_exit.load(Ordering::SeqCst) >= 0
    }
}

/// Whether the LVT has an entry for corrected machine checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmci {
    /// `MCG_CAP.CMCI_P` is set.
    Present,
    /// It is not.
    Absent,
}

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet([u64; 4]);

impl VectorSet {
    /// Adds one.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    /// Whether it is in.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)] & (1 << (vector % 64)) != 0
    }
}
