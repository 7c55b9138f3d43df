//! On `/dev/kvm`.

use std::sync::Arc;

use kvm_bindings::kvm_device_attr;

use super::{read_msrs, write_cpuid, write_msrs};
use crate::argument::Argument;
use crate::errno::Errno;
use crate::fds;
use crate::system::System;
use crate::table::Answer;
use crate::vcpu::MMAP_SIZE;

/// Calls without an argument refuse one.
fn no_argument(argument: Argument) -> Result<(), Errno> {
    if argument.value() == 0 {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}

pub(crate) fn get_api_version(system: &Arc<System>, argument: Argument) -> Answer {
    no_argument(argument)?;
    Ok(i64::from(system.api_version()))
}

pub(crate) fn create_vm(system: &Arc<System>, argument: Argument) -> Answer {
    let vm = system.create_vm(argument.value())?;
    fds::open_vm(&vm).map(i64::from)
}

#[expect(clippy::unnecessary_wraps, reason = "a row of the table")]
pub(crate) fn check_extension(system: &Arc<System>, argument: Argument) -> Answer {
    Ok(i64::from(system.check_extension(argument.value())))
}

pub(crate) fn get_vcpu_mmap_size(_: &Arc<System>, argument: Argument) -> Answer {
    no_argument(argument)?;
    Ok(MMAP_SIZE as i64)
}

/// A count that the program fills with its room, then the indices.
fn write_list(argument: Argument, list: &[u32]) -> Answer {
    let room: u32 = argument.read()?;
    argument.write(&(list.len() as u32))?;
    if (room as usize) < list.len() {
        return Err(Errno::E2BIG);
    }
    argument.offset(4).write_slice(list)?;
    Ok(0)
}

pub(crate) fn get_msr_index_list(system: &Arc<System>, argument: Argument) -> Answer {
    write_list(argument, system.msr_index_list())
}

pub(crate) fn get_msr_feature_index_list(system: &Arc<System>, argument: Argument) -> Answer {
    write_list(argument, system.msr_feature_index_list())
}

pub(crate) fn get_supported_cpuid(system: &Arc<System>, argument: Argument) -> Answer {
    write_cpuid(argument, system.supported_cpuid()).map(|()| 0)
}

pub(crate) fn get_emulated_cpuid(system: &Arc<System>, argument: Argument) -> Answer {
    write_cpuid(argument, &system.emulated_cpuid()).map(|()| 0)
}

pub(crate) fn get_msrs(system: &Arc<System>, argument: Argument) -> Answer {
    let mut entries = read_msrs(argument)?;
    let read = entries.iter_mut().map_while(|entry| {
        let value = system.feature_msr(entry.index);
        entry.data = value.unwrap_or(0);
        value.map(drop)
    });
    let count = read.count();
    write_msrs(argument, &entries)?;
    Ok(count as i64)
}

pub(crate) fn get_mce_cap_supported(system: &Arc<System>, argument: Argument) -> Answer {
    argument.write(&system.mce_cap_supported()).map(|()| 0)
}

pub(crate) fn get_device_attr(system: &Arc<System>, argument: Argument) -> Answer {
    let attr: kvm_device_attr = argument.read()?;
    let value = system.attribute(attr.group, attr.attr)?;
    Argument::new(attr.addr).write(&value).map(|()| 0)
}

pub(crate) fn has_device_attr(system: &Arc<System>, argument: Argument) -> Answer {
    let attr: kvm_device_attr = argument.read()?;
    system.attribute(attr.group, attr.attr).map(|_| 0)
}
