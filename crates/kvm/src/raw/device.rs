//! On a device (`kvm_device_ioctl`).

use std::sync::Arc;

use kvm_bindings::kvm_device_attr;

use crate::argument::Argument;
use crate::device::Device;
use crate::errno::Errno;
use crate::table::Answer;

pub(crate) fn set_attr(device: &Arc<Device>, argument: Argument) -> Answer {
    let attr: kvm_device_attr = argument.read()?;
    Device::has_attribute(attr.group, attr.attr)?;
    let file: i32 = Argument::new(attr.addr).read()?;
    device.set_attribute(attr.attr, file).map(|()| 0)
}

/// VFIO's device has nothing to read.
pub(crate) fn get_attr(_: &Arc<Device>, _: Argument) -> Answer {
    Err(Errno::EPERM)
}

pub(crate) fn has_attr(_: &Arc<Device>, argument: Argument) -> Answer {
    let attr: kvm_device_attr = argument.read()?;
    Device::has_attribute(attr.group, attr.attr).map(|()| 0)
}
