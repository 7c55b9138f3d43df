//! Virtio 1.2: what every device has in common, apart from the transport.
//!
//! A device is one file: its type, queues, features, configuration space, and
//! [`VirtioDevice::service`], which is called whenever one of its queues may have something to do:
//! after the driver's notification, and when the device's own backend (a thread that reads a
//! terminal, a socket) says so through [`Service`]. The transport ([`pci::VirtioPci`]) owns the
//! queues and everything that the driver negotiates.
//!
//! ```text
//!   vCPU thread ── notify ──> VirtioPci ── service(queue) ──> device
//!   backend thread ─ Service::service ─^         │ chains: pop, fill, push
//!                                                └──> used ring, MSI-X
//! ```

pub mod blk;
mod common;
pub mod console;
pub mod pci;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;

use std::sync::Weak;

use thiserror::Error;

pub use queue::{Chain, Queues, Step};

/// `VIRTIO_F_VERSION_1`: no legacy.
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// Device types (virtio 1.2, chapter 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// 9P transport.
    P9 = 9,
}

impl DeviceType {
    /// The PCI class code that suits it.
    pub fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Console => 0x07_80_00,
            Self::Rng | Self::Balloon | Self::P9 => 0x00_ff_00,
        }
    }
}

/// The driver broke the protocol: the device stops until it is reset.
#[derive(Debug, Error)]
pub enum ProtocolError {
    /// The rings or descriptors make no sense.
    #[error("virtqueue {queue}: {cause}")]
    Queue {
        /// Which.
        queue: usize,
        /// Why.
        cause: virtio_queue::Error,
    },
    /// A request is not of the form that this device takes.
    #[error("malformed request: {0}")]
    Request(&'static str),
}

/// A device without its transport.
pub trait VirtioDevice: Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;
    /// The largest size of each queue, which also says how many there are.
    fn queue_sizes(&self) -> &[u16];
    /// The features of this type that it offers.
    fn features(&self) -> u64 {
        0
    }
    /// Told once, before the guest runs: how its backend has a queue serviced.
    fn connect(&mut self, _service: Weak<dyn Service>) {}
    /// Its configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    /// The driver writes to the configuration space; most have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready, with these features.
    fn activate(&mut self, _features: u64) {}
    /// Back to the state before the driver.
    fn reset(&mut self) {}
    /// Does what there is to do on `queue`.
    fn service(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), ProtocolError>;
}

/// How a device's backend has a queue serviced.
pub trait Service: Send + Sync {
    /// Services `queue`, from any thread; does nothing while the driver is not ready.
    fn service(&self, queue: usize);
}
