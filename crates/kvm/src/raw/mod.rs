//! The handlers behind the table: arguments copied in, the typed call, results copied out.
//!
//! Sizes, orders of checks and errnos are those of `kvm_dev_ioctl`, `kvm_vm_ioctl` and
//! `kvm_vcpu_ioctl` in `virt/kvm/kvm_main.c` and of their parts in `arch/x86/kvm/x86.c`.

pub(crate) mod device;
pub(crate) mod system;
pub(crate) mod vcpu;
pub(crate) mod vm;
pub(crate) mod vm_irq;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};

use crate::argument::Argument;
use crate::errno::Errno;

/// Most entries of one `KVM_GET_MSRS`.
const MAX_IO_MSRS: u32 = 256;
/// `struct kvm_msrs` and `struct kvm_cpuid2`: a count and padding, then the entries.
const HEADER: usize = 8;

/// The entries behind a `struct kvm_msrs`.
fn read_msrs(argument: Argument) -> Result<Vec<kvm_msr_entry>, Errno> {
    let [count, _padding] = read_header(argument)?;
    if count >= MAX_IO_MSRS {
        return Err(Errno::E2BIG);
    }
    argument.offset(HEADER).read_slice(count as usize)
}

fn write_msrs(argument: Argument, entries: &[kvm_msr_entry]) -> Result<(), Errno> {
    argument.offset(HEADER).write_slice(entries)
}

/// A `struct kvm_cpuid2` for the program: it says how many entries it has room for.
fn write_cpuid(argument: Argument, entries: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
    let [room, padding] = read_header(argument)?;
    if (room as usize) < entries.len() {
        return Err(Errno::E2BIG);
    }
    argument.offset(HEADER).write_slice(entries)?;
    argument.write_slice(&[entries.len() as u32, padding])
}

fn read_header(argument: Argument) -> Result<[u32; 2], Errno> {
    Ok([argument.read()?, argument.offset(4).read()?])
}
