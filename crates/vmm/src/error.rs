//! Why a machine can't be built.

use addr::Gpa;
use devices::{bus::BusError, pci::root::PciError};
use memory::{ram::RamError, space::SpaceError};
use thiserror::Error;

use crate::BootError;

/// Why a machine can't be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Too few or too many vCPUs.
    #[error("{asked} vCPUs: this accelerator takes 1 to {most}")]
    Cpus {
        /// What was asked for.
        asked: u8,
        /// The accelerator's limit.
        most: u32,
    },
    /// Too little memory, or not a whole number of pages.
    #[error("{asked} bytes of memory: give at least {least}, in whole mebibytes")]
    Memory {
        /// What was asked for.
        asked: u64,
        /// The least that makes sense.
        least: u64,
    },
    /// The host gives no memory.
    #[error("allocating guest memory: {0}")]
    Ram(#[from] RamError),
    /// A call of the KVM API failed.
    #[error("{call}: {cause}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// Why.
        cause: accel::Errno,
    },
    /// The guest physical address space can't be laid out so, or a memory slot was refused.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// No memory for the log of written pages.
    #[error("the log of pages that devices write: {0}")]
    Log(String),
    /// The kernel, the initrd or the command line can't be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Boot data can't be written to guest memory.
    #[error("writing {what} to guest memory at {gpa}")]
    Write {
        /// What.
        what: &'static str,
        /// Where.
        gpa: Gpa,
    },
    /// Two devices claim one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// No room on the PCI bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// A device has queues that can't be.
    #[error("virtqueues of a device: {0}")]
    Queues(String),
    /// No eventfd for an interrupt.
    #[error("eventfd for an interrupt line: {0}")]
    EventFd(std::io::Error),
}

/// Names the call of a failed `accel` operation.
pub(crate) trait Named<T> {
    /// The same, with the name.
    fn named(self, call: &'static str) -> Result<T, BuildError>;
}

impl<T> Named<T> for accel::Result<T> {
    fn named(self, call: &'static str) -> Result<T, BuildError> {
        self.map_err(|cause| BuildError::Kvm { call, cause })
    }
}
