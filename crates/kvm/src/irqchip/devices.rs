//! The controllers as devices on the I/O buses: which port or address is whose.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cpu::Handled;

use crate::bus::{Counted, IoBus, IoDevice};
use crate::clock::time::monotonic_ns;
use crate::errno::Errno;
use crate::service::{AlarmHandle, Expire, Service};

use super::apic::Alarm;
use super::apic::registers::reg;
use super::controllers::{AckNotifier, Controllers};
use super::ioapic;
use super::lines::Source;
use super::pit::{Pit, Reinject, Tick};

/// The 8259s' ports.
pub(super) struct PicPorts(pub(super) Arc<Controllers>);

impl IoDevice for PicPorts {
    fn read(&self, address: u64, data: &mut [u8]) -> Handled {
        match data {
            [byte] => *byte = self.0.read_pic(address as u16),
            wide => wide.fill(0),
        }
        Handled::Yes
    }

    fn write(&self, address: u64, data: &[u8]) -> Handled {
        if let [byte] = data {
            self.0.write_pic(address as u16, *byte);
        }
        Handled::Yes
    }
}

impl PicPorts {
    pub(super) fn add(controllers: &Arc<Controllers>, ports: &IoBus) -> Result<(), Errno> {
        for start in [0x20, 0xa0, 0x4d0] {
            let device = Arc::new(PicPorts(Arc::clone(controllers)));
            ports.add(start, 2, Counted::Yes, device)?;
        }
        Ok(())
    }
}

/// The IOAPIC's registers.
pub(super) struct IoapicRegisters(pub(super) Arc<Controllers>);

impl IoDevice for IoapicRegisters {
    fn read(&self, address: u64, data: &mut [u8]) -> Handled {
        let Some(value) = self.0.read_ioapic(address) else {
            return Handled::No;
        };
        let bytes = u64::from(value).to_le_bytes();
        data.fill(0);
        if matches!(data.len(), 1 | 2 | 4 | 8) {
            data.copy_from_slice(&bytes[..data.len()]);
        }
        Handled::Yes
    }

    fn write(&self, address: u64, data: &[u8]) -> Handled {
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] | [a, b, c, d, _, _, _, _] => u32::from_le_bytes([a, b, c, d]),
            _ => return Handled::Yes,
        };
        match self.0.write_ioapic(address, value) {
            Some(()) => Handled::Yes,
            None => Handled::No,
        }
    }
}

impl IoapicRegisters {
    pub(super) fn add(controllers: &Arc<Controllers>, memory: &IoBus) -> Result<(), Errno> {
        let device = Arc::new(IoapicRegisters(Arc::clone(controllers)));
        memory.add(ioapic::BASE, ioapic::LENGTH, Counted::Yes, device)
    }
}

/// Whether port 0x61 belongs to the PIT (`KVM_PIT_SPEAKER_DUMMY`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    /// It does.
    Present,
    /// It is the monitor's.
    Absent,
}

/// The PIT with its host timer.
pub struct PitDevice {
    pit: Mutex<Pit>,
    alarm: AlarmHandle,
    controllers: Arc<Controllers>,
}

impl PitDevice {
    pub(super) fn create(
        controllers: &Arc<Controllers>,
        service: &Service,
        ports: &IoBus,
        speaker: Speaker,
    ) -> Result<Arc<PitDevice>, Errno> {
        let device = Arc::new(PitDevice {
            pit: Mutex::new(Pit::new(monotonic_ns())),
            alarm: service.alarm(),
            controllers: Arc::clone(controllers),
        });
        device
            .alarm
            .set_target(Arc::downgrade(&(Arc::clone(&device) as Arc<dyn Expire>)));
        let listener = Arc::new(PitPorts(Arc::clone(&device)));
        ports.add(0x40, 4, Counted::Yes, listener)?;
        if speaker == Speaker::Present {
            ports.add(
                0x61,
                4,
                Counted::Yes,
                Arc::new(SpeakerPort(Arc::clone(&device))),
            )?;
        }
        controllers.add_notifier(&device.as_notifier());
        Ok(device)
    }

    fn as_notifier(self: &Arc<Self>) -> Weak<dyn AckNotifier> {
        Arc::downgrade(&(Arc::clone(self) as Arc<dyn AckNotifier>))
    }

    fn lock(&self) -> MutexGuard<'_, Pit> {
        self.pit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the PIT, then sets the host's alarm to what it wants.
    pub fn with<R>(&self, change: impl FnOnce(&mut Pit, u64) -> R) -> R {
        let mut pit = self.lock();
        let before = pit.alarm();
        let result = change(&mut pit, monotonic_ns());
        if pit.alarm() != before {
            self.alarm.set(pit.alarm());
        }
        result
    }

    /// `KVM_REINJECT_CONTROL`.
    pub fn set_reinject(self: &Arc<Self>, reinject: Reinject) {
        let before = self.with(|pit, _| {
            let before = pit.reinject();
            pit.set_reinject(reinject);
            before
        });
        // Without reinjection nobody needs to know about this interrupt's end.
        match (before, reinject) {
            (Reinject::Off, Reinject::On) => self.controllers.add_notifier(&self.as_notifier()),
            (Reinject::On, Reinject::Off) => self.controllers.remove_notifier(&self.as_notifier()),
            _ => {}
        }
    }

    fn carry_out(&self, tick: Tick) {
        if tick == Tick::Nothing {
            return;
        }
        self.controllers.pulse_gsi(0, Source::Pit);
        // Linux's old NMI watchdog: the PIT on LINT0, as an NMI.
        let mut watchdog = false;
        let apics = self.controllers.apics();
        apics.for_each(|lapic| watchdog |= lapic.has_nmi_watchdog());
        if watchdog {
            apics.for_each(|lapic| {
                lapic.deliver_local(reg::LVT0);
            });
        }
    }
}

impl Expire for PitDevice {
    fn expired(&self) {
        let tick = self.with(Pit::fire);
        // The alarm is used up, so it must be set again even if the next one is the same.
        self.alarm.set(self.lock().alarm());
        self.carry_out(tick);
    }
}

impl AckNotifier for PitDevice {
    fn gsi(&self) -> u32 {
        0
    }

    fn acknowledged(&self, _controllers: &Controllers) {
        let tick = self.with(|pit, _| pit.acknowledge());
        self.carry_out(tick);
    }

    fn unmasked(&self) {
        self.with(|pit, _| pit.forget_ticks());
    }
}

struct PitPorts(Arc<PitDevice>);

impl IoDevice for PitPorts {
    fn read(&self, address: u64, data: &mut [u8]) -> Handled {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.0.with(|pit, now| pit.read(address as u16, now));
        }
        Handled::Yes
    }

    fn write(&self, address: u64, data: &[u8]) -> Handled {
        if let Some(value) = data.first() {
            self.0
                .with(|pit, now| pit.write(address as u16, *value, now));
        }
        Handled::Yes
    }
}

struct SpeakerPort(Arc<PitDevice>);

impl IoDevice for SpeakerPort {
    fn read(&self, address: u64, data: &mut [u8]) -> Handled {
        if address != 0x61 {
            return Handled::No;
        }
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.0.with(|pit, now| pit.read_speaker(now));
        }
        Handled::Yes
    }

    fn write(&self, address: u64, data: &[u8]) -> Handled {
        if address != 0x61 {
            return Handled::No;
        }
        if let Some(value) = data.first() {
            self.0.with(|pit, now| pit.write_speaker(*value, now));
        }
        Handled::Yes
    }
}
