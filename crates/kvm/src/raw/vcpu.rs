//! On a vCPU.

use std::os::fd::IntoRawFd;
use std::sync::Arc;

use kvm_bindings::{
    kvm_cpuid_entry, kvm_cpuid_entry2, kvm_device_attr, kvm_enable_cap, kvm_guest_debug,
    kvm_interrupt, kvm_lapic_state, kvm_mp_state, kvm_pre_fault_memory, kvm_regs, kvm_sregs,
    kvm_sregs2, kvm_tpr_access_ctl, kvm_translation, kvm_vapic_addr, kvm_vcpu_events, kvm_x86_mce,
    kvm_xcrs, kvm_xsave,
};

use super::{HEADER, read_header, read_msrs, write_cpuid, write_msrs};
use crate::argument::Argument;
use crate::cpuid::MAX_ENTRIES;
use crate::errno::Errno;
use crate::signals::mask_from;
use crate::table::Answer;
use crate::vcpu::{Vcpu, nested};

const DONE: Answer = Ok(0);

macro_rules! get {
    ($($name:ident: $call:ident;)*) => {
        $(pub(crate) fn $name(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
            argument.write(&vcpu.$call()).map(|()| 0)
        })*
    };
}

macro_rules! set {
    ($($name:ident($structure:ty): $call:ident;)*) => {
        $(pub(crate) fn $name(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
            let value: $structure = argument.read()?;
            vcpu.$call(&value).map(|()| 0)
        })*
    };
}

get! {
    get_regs: get_regs;
    get_sregs: get_sregs;
    get_sregs2: get_sregs2;
    get_fpu: get_fpu;
    get_xcrs: get_xcrs;
    get_debugregs: get_debugregs;
    get_vcpu_events: get_vcpu_events;
    get_mp_state: get_mp_state;
}

set! {
    set_sregs(kvm_sregs): set_sregs;
    set_sregs2(kvm_sregs2): set_sregs2;
    set_xcrs(kvm_xcrs): set_xcrs;
    set_debugregs(kvm_bindings::kvm_debugregs): set_debugregs;
    set_vcpu_events(kvm_vcpu_events): set_vcpu_events;
    set_guest_debug(kvm_guest_debug): set_guest_debug;
    set_mce(kvm_x86_mce): set_mce;
    enable_cap(kvm_enable_cap): enable_cap;
}

/// Takes no argument.
pub(crate) fn run(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    if argument.value() != 0 {
        return Err(Errno::EINVAL);
    }
    vcpu.run().map(|()| 0)
}

pub(crate) fn translate(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let asked: kvm_translation = argument.read()?;
    let found = vcpu.translate(addr::Address::new(asked.linear_address));
    argument.write(&found).map(|()| 0)
}

/// What is left of the range is told in any case.
pub(crate) fn pre_fault_memory(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let mut range: kvm_pre_fault_memory = argument.read()?;
    let answer = vcpu.pre_fault_memory(&mut range);
    argument.write(&range)?;
    answer.map(|()| 0)
}

pub(crate) fn get_stats_fd(vcpu: &Arc<Vcpu>, _: Argument) -> Answer {
    vcpu.stats_fd().map(|fd| i64::from(fd.into_raw_fd()))
}

pub(crate) fn get_xsave(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    argument.write_slice(&vcpu.get_xsave().region)?;
    DONE
}

pub(crate) fn set_xsave(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let mut xsave = kvm_xsave::default();
    let words = argument.read_slice(xsave.region.len())?;
    xsave.region.copy_from_slice(&words);
    vcpu.set_xsave(&xsave).map(|()| 0)
}

pub(crate) fn set_regs(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let regs: kvm_regs = argument.read()?;
    vcpu.set_regs(&regs);
    DONE
}

pub(crate) fn set_fpu(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let fpu = argument.read()?;
    vcpu.set_fpu(&fpu);
    DONE
}

pub(crate) fn set_mp_state(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let state: kvm_mp_state = argument.read()?;
    vcpu.set_mp_state(state).map(|()| 0)
}

pub(crate) fn get_lapic(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let state = vcpu.get_lapic()?;
    argument.write(&state).map(|()| 0)
}

/// Without a local APIC the argument is not looked at.
pub(crate) fn set_lapic(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    vcpu.lapic().ok_or(Errno::EINVAL)?;
    let state: kvm_lapic_state = argument.read()?;
    vcpu.set_lapic(&state).map(|()| 0)
}

/// A null pointer takes the mask back.
pub(crate) fn set_signal_mask(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let mask = if argument.value() == 0 {
        None
    } else {
        let len: u32 = argument.read()?;
        mask_from(len, 0)?;
        Some(mask_from(len, argument.offset(4).read()?)?)
    };
    vcpu.set_signal_mask(mask);
    DONE
}

pub(crate) fn interrupt(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let interrupt: kvm_interrupt = argument.read()?;
    vcpu.interrupt(interrupt.irq).map(|()| 0)
}

pub(crate) fn nmi(vcpu: &Arc<Vcpu>, _: Argument) -> Answer {
    vcpu.nmi();
    DONE
}

/// As a kernel without system management mode answers.
pub(crate) fn smi(_: &Arc<Vcpu>, _: Argument) -> Answer {
    Err(Errno::ENOTTY)
}

pub(crate) fn get_msrs(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let mut entries = read_msrs(argument)?;
    let count = vcpu.get_msrs(&mut entries);
    write_msrs(argument, &entries)?;
    Ok(count as i64)
}

pub(crate) fn set_msrs(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let entries = read_msrs(argument)?;
    Ok(vcpu.set_msrs(&entries) as i64)
}

fn cpuid_count(argument: Argument) -> Result<usize, Errno> {
    let [count, _padding] = read_header(argument)?;
    let count = count as usize;
    if count > MAX_ENTRIES {
        return Err(Errno::E2BIG);
    }
    Ok(count)
}

/// The old form, whose entries have no index.
pub(crate) fn set_cpuid(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let count = cpuid_count(argument)?;
    let entries: Vec<kvm_cpuid_entry> = argument.offset(HEADER).read_slice(count)?;
    let entries = entries.iter().map(|e| kvm_cpuid_entry2 {
        function: e.function,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..Default::default()
    });
    vcpu.set_cpuid(entries.collect()).map(|()| 0)
}

pub(crate) fn set_cpuid2(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let count = cpuid_count(argument)?;
    let entries = argument.offset(HEADER).read_slice(count)?;
    vcpu.set_cpuid(entries).map(|()| 0)
}

pub(crate) fn get_cpuid2(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    write_cpuid(argument, &vcpu.get_cpuid()).map(|()| 0)
}

pub(crate) fn set_tsc_khz(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    vcpu.set_tsc_khz(argument.value() as u32).map(|()| 0)
}

#[expect(clippy::unnecessary_wraps, reason = "a row of the table")]
pub(crate) fn get_tsc_khz(vcpu: &Arc<Vcpu>, _: Argument) -> Answer {
    Ok(i64::from(vcpu.tsc_khz()))
}

pub(crate) fn tpr_access_reporting(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let control: kvm_tpr_access_ctl = argument.read()?;
    vcpu.set_tpr_reporting(control.enabled, control.flags)?;
    argument.write(&control).map(|()| 0)
}

pub(crate) fn set_vapic_addr(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    vcpu.lapic().ok_or(Errno::EINVAL)?;
    let address: kvm_vapic_addr = argument.read()?;
    vcpu.set_vapic_address(address.vapic_addr).map(|()| 0)
}

pub(crate) fn setup_mce(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let cap: u64 = argument.read()?;
    vcpu.set_up_mce(cap).map(|()| 0)
}

pub(crate) fn kvmclock_ctrl(vcpu: &Arc<Vcpu>, _: Argument) -> Answer {
    vcpu.kvmclock_ctrl().map(|()| 0)
}

fn attribute(argument: Argument) -> Result<kvm_device_attr, Errno> {
    let attr: kvm_device_attr = argument.read()?;
    Vcpu::has_attribute(attr.group, attr.attr)?;
    Ok(attr)
}

pub(crate) fn has_device_attr(_: &Arc<Vcpu>, argument: Argument) -> Answer {
    attribute(argument).map(|_| 0)
}

pub(crate) fn get_device_attr(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let attr = attribute(argument)?;
    Argument::new(attr.addr)
        .write(&vcpu.tsc_offset())
        .map(|()| 0)
}

pub(crate) fn set_device_attr(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let attr = attribute(argument)?;
    vcpu.set_tsc_offset(Argument::new(attr.addr).read()?);
    DONE
}

/// The program says in `size` how much room it has; where that is too little, it is told how much.
pub(crate) fn get_nested_state(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let size = argument.offset(4);
    let room: u32 = size.read()?;
    if room < nested::HEADER {
        size.write(&nested::HEADER)?;
        return Err(Errno::E2BIG);
    }
    argument.write_slice(&vcpu.nested_state()).map(|()| 0)
}

pub(crate) fn set_nested_state(vcpu: &Arc<Vcpu>, argument: Argument) -> Answer {
    let mut state = [0; nested::WORDS];
    state.copy_from_slice(&argument.read_slice::<u64>(nested::WORDS)?);
    vcpu.set_nested_state(&state).map(|()| 0)
}
