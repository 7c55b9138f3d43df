//! [`Irqchip`]: everything of a VM that interrupts, as its ioctls and its vCPUs use it.
//!
//! The VM's ioctls call the methods of the first part; a vCPU's run loop and its
//! [`cpu::Platform`] those of the second, in the vCPU's own thread, with its [`Lapic`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cpu::Handled;
use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_coalesced_mmio_zone, kvm_ioeventfd, kvm_irqfd, kvm_lapic_state,
    kvm_pit_config, kvm_pit_state, kvm_pit_state2, kvm_reinject_control,
};

use crate::bus::IoBus;
use crate::clock::time::{TimeSource, monotonic_ns};
use crate::errno::Errno;
use crate::eventfd::coalesced::Zones;
use crate::eventfd::ioeventfd::Ioeventfds;
use crate::eventfd::irqfd::Irqfds;
use crate::service::{AlarmHandle, Expire, Service};

use super::apic::registers::reg;
use super::apic::{Alarm, ApicMode, BaseWriter, Lapic, LapicConfig, Refused, Role};
use super::controllers::{Controllers, Delay};
use super::delivery::Delivered;
use super::devices::{IoapicRegisters, PicPorts, PitDevice, Speaker};
use super::ioapic::LineStatus;
use super::lines::Source;
use super::message::Level;
use super::pit::Reinject;
use super::policy::{ChipMode, Policy};
use super::routing::MAX_ROUTES;
use super::wake::VcpuWake;

/// Whether the VM has vCPUs already: controllers come before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vcpus {
    /// None yet.
    None,
    /// Some.
    Some,
}

/// The interrupt controllers, buses, timers and eventfds of a VM.
pub struct Irqchip {
    controllers: Arc<Controllers>,
    ports: IoBus,
    memory: IoBus,
    irqfds: Irqfds,
    ioeventfds: Ioeventfds,
    zones: Zones,
    pit: Mutex<Option<Arc<PitDevice>>>,
    service: Service,
}

/// Sends held-back interrupts 10 ms later.
struct StormBrake {
    alarm: AlarmHandle,
    controllers: Weak<Controllers>,
}

const STORM_PAUSE_NS: u64 = 10_000_000;

impl Delay for StormBrake {
    fn later(&self) {
        self.alarm.set(Some(monotonic_ns() + STORM_PAUSE_NS));
    }
}

impl Expire for StormBrake {
    fn expired(&self) {
        if let Some(controllers) = self.controllers.upgrade() {
            controllers.reinject_storm();
        }
    }
}

// ---- for the VM's ioctls

impl Irqchip {
    /// A VM without controllers.
    pub fn new() -> Result<Irqchip, Errno> {
        let service = Service::new()?;
        let controllers = Arc::new(Controllers::new(Arc::new(Policy::default())));
        Ok(Irqchip {
            controllers,
            ports: IoBus::default(),
            memory: IoBus::default(),
            irqfds: Irqfds::default(),
            ioeventfds: Ioeventfds::default(),
            zones: Zones::default(),
            pit: Mutex::new(None),
            service,
        })
    }

    /// VM-wide rules: `KVM_CAP_X2APIC_API`, quirks, the APIC's bus clock.
    pub fn policy(&self) -> &Policy {
        self.controllers.policy()
    }

    /// Its thread, for whatever else of the VM has a time.
    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Which controllers there are.
    pub fn mode(&self) -> ChipMode {
        self.policy().mode()
    }

    /// The controllers: `KVM_GET_IRQCHIP`, `KVM_SET_IRQCHIP`, `KVM_SET_GSI_ROUTING`,
    /// `KVM_SIGNAL_MSI`.
    pub fn controllers(&self) -> &Controllers {
        &self.controllers
    }

    /// `KVM_CREATE_IRQCHIP`.
    pub fn create(&self, vcpus: Vcpus) -> Result<(), Errno> {
        self.check_new(vcpus, Errno::EINVAL)?;
        PicPorts::add(&self.controllers, &self.ports)?;
        IoapicRegisters::add(&self.controllers, &self.memory)?;
        let storm = Arc::new(StormBrake {
            alarm: self.service.alarm(),
            controllers: Arc::downgrade(&self.controllers),
        });
        storm
            .alarm
            .set_target(Arc::downgrade(&(Arc::clone(&storm) as Arc<dyn Expire>)));
        self.controllers.set_delay(storm);
        self.controllers.create_kernel();
        Ok(())
    }

    /// `KVM_CAP_SPLIT_IRQCHIP`.
    pub fn create_split(&self, reserved_pins: u64, vcpus: Vcpus) -> Result<(), Errno> {
        let pins = usize::try_from(reserved_pins).map_err(|_| Errno::EINVAL)?;
        if pins > MAX_ROUTES {
            return Err(Errno::EINVAL);
        }
        self.check_new(vcpus, Errno::EEXIST)?;
        self.controllers.create_split(pins);
        Ok(())
    }

    fn check_new(&self, vcpus: Vcpus, too_late: Errno) -> Result<(), Errno> {
        match (self.mode(), vcpus) {
            (ChipMode::None, Vcpus::None) => Ok(()),
            (ChipMode::None, Vcpus::Some) => Err(too_late),
            _ => Err(Errno::EEXIST),
        }
    }

    /// `KVM_IRQ_LINE`, `KVM_IRQ_LINE_STATUS`: the status.
    pub fn irq_line(&self, gsi: u32, level: u32, wanted: LineStatus) -> Result<Delivered, Errno> {
        if self.mode() == ChipMode::None {
            return Err(Errno::ENXIO);
        }
        let level = if level == 0 {
            Level::Deassert
        } else {
            Level::Assert
        };
        self.controllers.device_has_written();
        Ok(self
            .controllers
            .set_gsi(gsi, Source::Userspace, level, wanted))
    }

    fn pit_slot(&self) -> MutexGuard<'_, Option<Arc<PitDevice>>> {
        self.pit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pit(&self) -> Result<Arc<PitDevice>, Errno> {
        self.pit_slot().clone().ok_or(Errno::ENXIO)
    }

    /// Whether there is a PIT.
    pub fn has_pit(&self) -> bool {
        self.pit_slot().is_some()
    }

    /// `KVM_CREATE_PIT2` (and `KVM_CREATE_PIT`, which is the same with the speaker).
    pub fn create_pit(&self, config: &kvm_pit_config) -> Result<(), Errno> {
        let mut slot = self.pit_slot();
        if slot.is_some() {
            return Err(Errno::EEXIST);
        }
        if self.mode() != ChipMode::Kernel {
            return Err(Errno::ENOENT);
        }
        let speaker = if config.flags & KVM_PIT_SPEAKER_DUMMY != 0 {
            Speaker::Present
        } else {
            Speaker::Absent
        };
        *slot = Some(PitDevice::create(
            &self.controllers,
            &self.service,
            &self.ports,
            speaker,
        )?);
        Ok(())
    }

    /// `KVM_GET_PIT`.
    pub fn pit_state(&self) -> Result<kvm_pit_state, Errno> {
        Ok(self.pit()?.with(|pit, _| pit.state()))
    }

    /// `KVM_SET_PIT`.
    pub fn set_pit_state(&self, state: &kvm_pit_state) -> Result<(), Errno> {
        self.pit()?.with(|pit, now| pit.set_state(state, now));
        Ok(())
    }

    /// `KVM_GET_PIT2`.
    pub fn pit_state2(&self) -> Result<kvm_pit_state2, Errno> {
        Ok(self.pit()?.with(|pit, _| pit.state2()))
    }

    /// `KVM_SET_PIT2`.
    pub fn set_pit_state2(&self, state: &kvm_pit_state2) -> Result<(), Errno> {
        self.pit()?.with(|pit, now| pit.set_state2(state, now));
        Ok(())
    }

    /// `KVM_REINJECT_CONTROL`.
    pub fn reinject_control(&self, control: &kvm_reinject_control) -> Result<(), Errno> {
        let reinject = if control.pit_reinject != 0 {
            Reinject::On
        } else {
            Reinject::Off
        };
        self.pit()?.set_reinject(reinject);
        Ok(())
    }

    /// `KVM_IRQFD`.
    pub fn irqfd(&self, request: &kvm_irqfd) -> Result<(), Errno> {
        self.irqfds
            .control(request, &self.controllers, &self.service)
    }

    /// `KVM_IOEVENTFD`.
    pub fn ioeventfd(&self, request: &kvm_ioeventfd) -> Result<(), Errno> {
        self.ioeventfds.control(request, &self.ports, &self.memory)
    }

    /// The zones of coalesced writes, and their ring.
    pub fn zones(&self) -> &Zones {
        &self.zones
    }

    /// `KVM_REGISTER_COALESCED_MMIO`.
    pub fn register_coalesced(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.zones.register(zone, &self.ports, &self.memory)
    }

    /// `KVM_UNREGISTER_COALESCED_MMIO`.
    pub fn unregister_coalesced(&self, zone: &kvm_coalesced_mmio_zone) -> Result<(), Errno> {
        self.zones.unregister(zone, &self.ports, &self.memory)
    }

    /// The local APIC of a new vCPU; `None` where the monitor has the controllers.
    pub fn add_vcpu(
        &self,
        id: u32,
        role: Role,
        wake: Arc<dyn VcpuWake>,
        time: Arc<dyn TimeSource>,
    ) -> Option<Arc<Lapic>> {
        if self.mode() == ChipMode::None {
            return None;
        }
        let alarm = Arc::new(self.service.alarm());
        let lapic = Arc::new(Lapic::new(LapicConfig {
            id,
            role,
            policy: Arc::clone(self.controllers.policy()),
            wake,
            time,
            alarm: alarm.clone(),
        }));
        alarm.set_target(Arc::downgrade(&(Arc::clone(&lapic) as Arc<dyn Expire>)));
        self.controllers.apics().add(&lapic);
        Some(lapic)
    }

    /// Takes back [`Self::add_vcpu`].
    pub fn remove_vcpu(&self, id: u32) {
        self.controllers.apics().remove(id);
    }
}

impl Expire for Lapic {
    fn expired(&self) {
        self.timer_fired();
    }
}

// ---- for a vCPU's thread

/// The MSRs of x2APIC mode.
pub const X2APIC_MSRS: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
const EOI_MSR: u32 = 0x80b;

impl Irqchip {
    /// Whether there is an interrupt for this CPU ([`cpu::Platform::interrupt_pending`]).
    pub fn has_interrupt(&self, lapic: &Lapic) -> bool {
        lapic.inject_pending_timer();
        self.controllers.has_interrupt(lapic)
    }

    /// The vector that the CPU takes now ([`cpu::Platform::acknowledge_interrupt`]).
    pub fn acknowledge(&self, lapic: &Lapic) -> Option<u8> {
        lapic.inject_pending_timer();
        self.controllers.acknowledge(lapic)
    }

    /// Reads a port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> Handled {
        self.ports.read(u64::from(port), data)
    }

    /// Writes a port.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Handled {
        self.ports.write(u64::from(port), data)
    }

    /// Reads a guest physical address outside all slots: first the CPU's own APIC, then the bus.
    pub fn read_memory(&self, lapic: Option<&Lapic>, gpa: addr::Gpa, data: &mut [u8]) -> Handled {
        if let Some((lapic, offset)) = self.own_apic(lapic, gpa) {
            match lapic.mode() {
                ApicMode::Xapic => lapic.read_memory(offset, data),
                _ => data.fill(0xff),
            }
            return Handled::Yes;
        }
        self.memory.read(gpa.raw(), data)
    }

    /// Writes a guest physical address outside all slots.
    pub fn write_memory(&self, lapic: Option<&Lapic>, gpa: addr::Gpa, data: &[u8]) -> Handled {
        if let Some((lapic, offset)) = self.own_apic(lapic, gpa) {
            if lapic.mode() == ApicMode::Xapic {
                self.write_own_apic(lapic, offset, data);
            }
            return Handled::Yes;
        }
        self.memory.write(gpa.raw(), data)
    }

    /// The APIC that answers at this address, unless the monitor wants the hole where it is off.
    fn own_apic<'a>(&self, lapic: Option<&'a Lapic>, gpa: addr::Gpa) -> Option<(&'a Lapic, u32)> {
        let lapic = lapic?;
        let offset = gpa
            .raw()
            .checked_sub(lapic.base_address())
            .filter(|offset| *offset < 0x1000)?;
        let answers = lapic.mode() == ApicMode::Xapic || self.policy().has_mmio_hole();
        answers.then_some((lapic, offset as u32))
    }

    fn write_own_apic(&self, lapic: &Lapic, offset: u32, data: &[u8]) {
        if offset == reg::EOI {
            self.controllers.refresh_eoi_interest(lapic);
        }
        self.controllers
            .apply(lapic, lapic.write_memory(offset, data));
    }

    /// Whether somebody besides the CPU waits for the end of this vector.
    pub fn is_eoi_awaited(&self, lapic: &Lapic, vector: u8) -> bool {
        self.controllers.refresh_eoi_interest(lapic);
        lapic.wants_eoi(vector)
    }

    /// The guest has ended the interrupt in service without touching the APIC.
    pub fn end_of_interrupt(&self, lapic: &Lapic) {
        self.controllers.refresh_eoi_interest(lapic);
        self.controllers.apply(lapic, lapic.end_silently());
    }

    /// `RDMSR` of [`X2APIC_MSRS`].
    pub fn read_x2apic(&self, lapic: &Lapic, index: u32) -> Result<u64, Refused> {
        lapic.read_msr(index)
    }

    /// `WRMSR` of [`X2APIC_MSRS`].
    pub fn write_x2apic(&self, lapic: &Lapic, index: u32, value: u64) -> Result<(), Refused> {
        if index == EOI_MSR {
            self.controllers.refresh_eoi_interest(lapic);
        }
        let effects = lapic.write_msr(index, value)?;
        self.controllers.apply(lapic, effects);
        Ok(())
    }

    /// Writes `IA32_APIC_BASE`, by the guest or by the monitor.
    pub fn set_apic_base(
        &self,
        lapic: &Lapic,
        value: u64,
        writer: BaseWriter,
    ) -> Result<(), Refused> {
        let effects = lapic.set_base(value, writer)?;
        self.controllers.apply(lapic, effects);
        Ok(())
    }

    /// Resets the APIC.
    pub fn reset_apic(&self, lapic: &Lapic, kind: super::apic::Reset) {
        self.controllers.apply(lapic, lapic.reset(kind));
    }

    /// `KVM_SET_LAPIC`.
    pub fn set_lapic(&self, lapic: &Lapic, state: &kvm_lapic_state) -> Result<(), Errno> {
        match lapic.set_state(state) {
            Ok(effects) => {
                self.controllers.lapic_restored(lapic, effects);
                Ok(())
            }
            Err(errno) => {
                // The spurious-vector register has changed all the same.
                self.controllers.apics().addressing_changed();
                Err(errno)
            }
        }
    }

    /// The EOI for which `KVM_RUN` must return with `KVM_EXIT_IOAPIC_EOI` now.
    pub fn take_eoi_exit(&self, lapic: &Lapic) -> Option<u8> {
        lapic
            .take_eoi_exit()
            .filter(|vector| lapic.wants_eoi(*vector))
    }
}
