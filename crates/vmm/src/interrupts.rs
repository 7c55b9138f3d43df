//! How devices' interrupts reach the accelerator: messages by `KVM_SIGNAL_MSI`, lines by irqfd.

use std::{os::fd::AsRawFd, sync::Arc};

use accel::Vm;
use devices::pci::msix::{MsiMessage, MsiSink};
use kvm_bindings::{kvm_irqfd, kvm_msi};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{BuildError, Named};

/// Messages to a VM.
pub(crate) struct VmMsi(pub(crate) Arc<dyn Vm>);

impl MsiSink for VmMsi {
    fn signal(&self, message: MsiMessage) {
        let address = message.address.raw();
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        if let Err(error) = self.0.signal_msi(&msi) {
            tracing::debug!(%error, ?message, "a message was refused");
        }
    }
}

/// A line: each write to the eventfd is an edge on `gsi`.
pub(crate) fn line(vm: &dyn Vm, gsi: u32) -> Result<Arc<EventFd>, BuildError> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BuildError::EventFd)?;
    let irqfd = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi,
        ..Default::default()
    };
    vm.irqfd(&irqfd).named("KVM_IRQFD")?;
    Ok(Arc::new(event))
}
