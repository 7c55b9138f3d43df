//! On a VM: interrupt controllers and event descriptors.

use std::sync::Arc;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_coalesced_mmio_zone, kvm_ioeventfd, kvm_irq_level, kvm_irqchip,
    kvm_irqfd, kvm_msi, kvm_pit_config, kvm_pit_state, kvm_pit_state2, kvm_reinject_control,
};

use crate::argument::Argument;
use crate::errno::Errno;
use crate::irqchip::ioapic::LineStatus;
use crate::table::{Answer, MAX_IRQ_ROUTES};
use crate::vm::Vm;

macro_rules! set {
    ($($name:ident($structure:ty): $call:ident;)*) => {
        $(pub(crate) fn $name(vm: &Arc<Vm>, argument: Argument) -> Answer {
            let value: $structure = argument.read()?;
            vm.irqchip().$call(&value).map(|()| 0)
        })*
    };
}

set! {
    create_pit2(kvm_pit_config): create_pit;
    set_pit(kvm_pit_state): set_pit_state;
    set_pit2(kvm_pit_state2): set_pit_state2;
    reinject_control(kvm_reinject_control): reinject_control;
    irqfd(kvm_irqfd): irqfd;
    ioeventfd(kvm_ioeventfd): ioeventfd;
    register_coalesced(kvm_coalesced_mmio_zone): register_coalesced;
    unregister_coalesced(kvm_coalesced_mmio_zone): unregister_coalesced;
}

pub(crate) fn create_irqchip(vm: &Arc<Vm>, _: Argument) -> Answer {
    vm.create_irqchip().map(|()| 0)
}

pub(crate) fn get_irqchip(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let mut chip: kvm_irqchip = argument.read()?;
    vm.get_irqchip(&mut chip)?;
    argument.write(&chip).map(|()| 0)
}

pub(crate) fn set_irqchip(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let chip: kvm_irqchip = argument.read()?;
    vm.set_irqchip(&chip).map(|()| 0)
}

pub(crate) fn create_pit(vm: &Arc<Vm>, _: Argument) -> Answer {
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.irqchip().create_pit(&config).map(|()| 0)
}

/// The program's structure is read first, as the kernel does.
pub(crate) fn get_pit(vm: &Arc<Vm>, argument: Argument) -> Answer {
    argument.read::<kvm_pit_state>()?;
    let state = vm.irqchip().pit_state()?;
    argument.write(&state).map(|()| 0)
}

pub(crate) fn get_pit2(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let state = vm.irqchip().pit_state2()?;
    argument.write(&state).map(|()| 0)
}

/// `struct kvm_irq_level`: the GSI, then the level.
fn line(argument: Argument) -> Result<(u32, u32), Errno> {
    argument.read::<kvm_irq_level>()?;
    Ok((argument.read()?, argument.offset(4).read()?))
}

pub(crate) fn irq_line(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let (gsi, level) = line(argument)?;
    vm.irqchip().irq_line(gsi, level, LineStatus::Ignored)?;
    Ok(0)
}

/// The status takes the GSI's place.
pub(crate) fn irq_line_status(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let (gsi, level) = line(argument)?;
    let status = vm.irqchip().irq_line(gsi, level, LineStatus::Wanted)?;
    argument.write(&status).map(|()| 0)
}

pub(crate) fn signal_msi(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let msi: kvm_msi = argument.read()?;
    let taken = vm.irqchip().controllers().signal_msi(&msi)?;
    Ok(i64::from(taken))
}

/// A count and flags, then the entries.
pub(crate) fn set_gsi_routing(vm: &Arc<Vm>, argument: Argument) -> Answer {
    let count: u32 = argument.read()?;
    let flags: u32 = argument.offset(4).read()?;
    if count > MAX_IRQ_ROUTES as u32 || flags != 0 {
        return Err(Errno::EINVAL);
    }
    let routes = argument.offset(8).read_slice(count as usize)?;
    let controllers = vm.irqchip().controllers();
    controllers.set_routing(&routes).map(|()| 0)
}
