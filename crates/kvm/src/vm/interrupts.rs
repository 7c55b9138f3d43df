//! Interrupt controllers of a VM, as the ioctls give them. All else about interrupts is called on
//! [`super::Shared::irqchip`] directly.

use kvm_bindings::kvm_irqchip;

use super::{Vm, write};
use crate::errno::Errno;
use crate::irqchip::chip::Irqchip;
use crate::irqchip::policy::ChipMode;

impl Vm {
    /// The interrupt controllers.
    pub fn irqchip(&self) -> &Irqchip {
        self.shared.irqchip()
    }

    /// `KVM_CREATE_IRQCHIP`.
    pub fn create_irqchip(&self) -> Result<(), Errno> {
        let shape = write(&self.shape);
        self.irqchip().create(Self::population(&shape))
    }

    /// `KVM_GET_IRQCHIP`: `chip.chip_id` says which.
    pub fn get_irqchip(&self, chip: &mut kvm_irqchip) -> Result<(), Errno> {
        self.need_kernel_chip()?;
        self.irqchip().controllers().state(chip)
    }

    /// `KVM_SET_IRQCHIP`.
    pub fn set_irqchip(&self, chip: &kvm_irqchip) -> Result<(), Errno> {
        self.need_kernel_chip()?;
        self.irqchip().controllers().set_state(chip)
    }

    fn need_kernel_chip(&self) -> Result<(), Errno> {
        if self.irqchip().mode() == ChipMode::Kernel {
            Ok(())
        } else {
            Err(Errno::ENXIO)
        }
    }
}
