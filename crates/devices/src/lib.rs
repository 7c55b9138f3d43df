//! Devices of a machine: serial, RTC, power management, PCI, virtio.
//!
//! A device is reached through a bus ([`bus::Device`]) and reaches out through three small
//! interfaces, so that it can be tested without a machine: [`IrqLine`] and [`pci::msix::MsiSink`]
//! for its interrupts, and [`power::PowerSink`] for the devices that end or reset the machine. A
//! virtio device ([`virtio::VirtioDevice`]) knows its queues and its configuration space and
//! nothing of PCI.
//!
//! Every register can be written with anything, at any width, by any vCPU, at any time: devices
//! answer garbage with what hardware would do, or ignore it, and never panic.

pub mod bus;
pub mod cmos;
pub mod pci;
pub mod pm;
pub mod power;
pub mod serial;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line of the ISA kind.
pub trait IrqLine: Send + Sync {
    /// Raises an edge.
    fn pulse(&self);
}

impl IrqLine for EventFd {
    /// With the descriptor registered as an irqfd, a write is an edge on its GSI.
    fn pulse(&self) {
        if let Err(error) = self.write(1) {
            tracing::warn!(%error, "an interrupt was lost");
        }
    }
}

/// Locks, also after a panic elsewhere: device state is valid between any two statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
