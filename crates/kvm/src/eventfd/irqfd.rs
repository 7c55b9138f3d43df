//! `KVM_IRQFD`: a GSI driven by an eventfd (api.rst, 4.75).
//!
//! Without resampling, each event is an edge: the GSI rises and falls. With `KVM_IRQFD_FLAG_RESAMPLE`
//! the line rises and stays; when the guest ends the interrupt, the line falls and the second
//! eventfd asks the device whether it still wants attention. All irqfds of a GSI with resampling
//! share one source of the line, so it falls once, and then all are asked.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};

use crate::errno::Errno;
use crate::irqchip::controllers::{AckNotifier, Controllers};
use crate::irqchip::ioapic::LineStatus;
use crate::irqchip::lines::Source;
use crate::irqchip::message::Level;
use crate::irqchip::policy::ChipMode;
use crate::service::{Ready, Service, Watch};

use super::handle::EventHandle;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One irqfd.
struct Irqfd {
    event: EventHandle,
    gsi: u32,
    resampler: Option<Arc<Resampler>>,
    controllers: Weak<Controllers>,
    /// Held while an event is delivered: once it is `false`, nothing more comes.
    active: Mutex<bool>,
}

impl Ready for Irqfd {
    fn ready(&self) {
        let active = lock(&self.active);
        if !*active || self.event.take().is_none() {
            return;
        }
        let Some(controllers) = self.controllers.upgrade() else {
            return;
        };
        controllers.device_has_written();
        if self.resampler.is_some() {
            controllers.set_gsi(
                self.gsi,
                Source::Resample,
                Level::Assert,
                LineStatus::Ignored,
            );
        } else if let Some(msi) = controllers.message_of(self.gsi) {
            // A message that nobody can take is lost, as on a real bus.
            let _ = controllers.send_msi(&msi);
        } else {
            controllers.pulse_gsi(self.gsi, Source::Userspace);
        }
    }
}

/// All irqfds with resampling of one GSI.
struct Resampler {
    gsi: u32,
    events: Mutex<Vec<Arc<EventHandle>>>,
}

impl AckNotifier for Resampler {
    fn gsi(&self) -> u32 {
        self.gsi
    }

    fn acknowledged(&self, controllers: &Controllers) {
        controllers.set_gsi(
            self.gsi,
            Source::Resample,
            Level::Deassert,
            LineStatus::Ignored,
        );
        self.resample();
    }

    fn resample(&self) -> bool {
        lock(&self.events).iter().for_each(|event| event.signal());
        true
    }
}

struct Assigned {
    /// First, so that it ends before the descriptor is closed.
    _watch: Watch,
    irqfd: Arc<Irqfd>,
    resample: Option<Arc<EventHandle>>,
}

/// The irqfds of a VM.
#[derive(Default)]
pub struct Irqfds {
    assigned: Mutex<Vec<Assigned>>,
    resamplers: Mutex<Vec<Arc<Resampler>>>,
}

impl Irqfds {
    /// `KVM_IRQFD`.
    pub fn control(
        &self,
        request: &kvm_irqfd,
        controllers: &Arc<Controllers>,
        service: &Service,
    ) -> Result<(), Errno> {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(Errno::EINVAL);
        }
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            return self.deassign(request, controllers);
        }
        self.assign(request, controllers, service)
    }

    fn assign(
        &self,
        request: &kvm_irqfd,
        controllers: &Arc<Controllers>,
        service: &Service,
    ) -> Result<(), Errno> {
        let resample = request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        match controllers.policy().mode() {
            ChipMode::None => return Err(Errno::EINVAL),
            ChipMode::Split if resample => return Err(Errno::EINVAL),
            _ => {}
        }
        let event = EventHandle::new(request.fd as RawFd)?;
        let resample = if resample {
            Some(Arc::new(EventHandle::new(request.resamplefd as RawFd)?))
        } else {
            None
        };
        let mut assigned = lock(&self.assigned);
        if assigned
            .iter()
            .any(|other| other.irqfd.event.is_same(&event))
        {
            return Err(Errno::EBUSY);
        }
        let resampler = resample
            .as_ref()
            .map(|event| self.join_resampler(request.gsi, event, controllers));
        let fd = event.fd();
        let irqfd = Arc::new(Irqfd {
            event,
            gsi: request.gsi,
            resampler,
            controllers: Arc::downgrade(controllers),
            active: Mutex::new(true),
        });
        let target: Weak<dyn Ready> = Arc::downgrade(&(Arc::clone(&irqfd) as Arc<dyn Ready>));
        let watch = service.watch(fd, target)?;
        assigned.push(Assigned {
            _watch: watch,
            irqfd,
            resample,
        });
        Ok(())
    }

    fn join_resampler(
        &self,
        gsi: u32,
        event: &Arc<EventHandle>,
        controllers: &Controllers,
    ) -> Arc<Resampler> {
        let mut resamplers = lock(&self.resamplers);
        if let Some(resampler) = resamplers.iter().find(|resampler| resampler.gsi == gsi) {
            lock(&resampler.events).push(Arc::clone(event));
            return Arc::clone(resampler);
        }
        let events = Mutex::new(vec![Arc::clone(event)]);
        let resampler = Arc::new(Resampler { gsi, events });
        controllers.add_notifier(&notifier(&resampler));
        resamplers.push(Arc::clone(&resampler));
        resampler
    }

    fn deassign(&self, request: &kvm_irqfd, controllers: &Controllers) -> Result<(), Errno> {
        let event = EventHandle::new(request.fd as RawFd)?;
        let gone: Vec<Assigned> = lock(&self.assigned)
            .extract_if(.., |a| {
                a.irqfd.gsi == request.gsi && a.irqfd.event.is_same(&event)
            })
            .collect();
        for assigned in &gone {
            // Waits for an event that is being delivered.
            *lock(&assigned.irqfd.active) = false;
            if let (Some(resampler), Some(event)) = (&assigned.irqfd.resampler, &assigned.resample)
            {
                self.leave_resampler(resampler, event, controllers);
            }
        }
        Ok(())
    }

    fn leave_resampler(
        &self,
        resampler: &Arc<Resampler>,
        event: &Arc<EventHandle>,
        controllers: &Controllers,
    ) {
        let mut resamplers = lock(&self.resamplers);
        let empty = {
            let mut events = lock(&resampler.events);
            events.retain(|other| !Arc::ptr_eq(other, event));
            events.is_empty()
        };
        if empty {
            resamplers.retain(|other| !Arc::ptr_eq(other, resampler));
            controllers.remove_notifier(&notifier(resampler));
            let low = Level::Deassert;
            controllers.set_gsi(resampler.gsi, Source::Resample, low, LineStatus::Ignored);
        }
    }
}

fn notifier(resampler: &Arc<Resampler>) -> Weak<dyn AckNotifier> {
    Arc::downgrade(&(Arc::clone(resampler) as Arc<dyn AckNotifier>))
}
