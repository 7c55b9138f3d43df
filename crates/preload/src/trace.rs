//! `--trace`: one line for each call, as strace would print it.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use kvm::Argument;
use kvm::table::IOCTLS;
use kvm_bindings::{
    kvm_dirty_log, kvm_enable_cap, kvm_irq_level, kvm_msi, kvm_regs, kvm_userspace_memory_region,
};

/// The name of an ioctl.
pub(crate) fn name(request: u32) -> String {
    match IOCTLS.iter().find(|row| row.request == request) {
        Some(row) => row.name.to_owned(),
        None => format!("{request:#x}"),
    }
}

/// Prints one call.
pub(crate) fn call(
    fd: i32,
    request: u32,
    argument: Argument,
    (result, errno): (i32, i32),
    took: Duration,
) {
    let name = name(request);
    let mut line = format!("[{}] ioctl({fd}, {name}", thread());
    let decoded = decode(&name, argument);
    // Writing to a String can't fail.
    let _ = match decoded {
        Some(text) => write!(line, ", {text}"),
        None => write!(line, ", {:#x}", argument.value()),
    };
    let _ = if result < 0 {
        let error = std::io::Error::from_raw_os_error(errno);
        write!(line, ") = -1 {error}")
    } else {
        write!(line, ") = {result}")
    };
    let _ = writeln!(line, " <{:.1} us>", took.as_secs_f64() * 1e6);
    // One write, so that threads don't mix their lines; nobody to tell where it fails.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn thread() -> i32 {
    // SAFETY: no arguments, no failure.
    unsafe { libc::gettid() }
}

/// What the argument points to, for calls whose structure says most of the story.
fn decode(name: &str, argument: Argument) -> Option<String> {
    match name {
        "KVM_SET_USER_MEMORY_REGION" => {
            let r: kvm_userspace_memory_region = argument.read().ok()?;
            Some(format!(
                "{{slot {:#x}, flags {:#x}, gpa {:#x}, size {:#x}, hva {:#x}}}",
                r.slot, r.flags, r.guest_phys_addr, r.memory_size, r.userspace_addr
            ))
        }
        "KVM_GET_DIRTY_LOG" => {
            let log: kvm_dirty_log = argument.read().ok()?;
            Some(format!("{{slot {:#x}}}", log.slot))
        }
        "KVM_ENABLE_CAP" => {
            let cap: kvm_enable_cap = argument.read().ok()?;
            Some(format!("{{cap {}, args {:x?}}}", cap.cap, cap.args))
        }
        "KVM_IRQ_LINE" | "KVM_IRQ_LINE_STATUS" => {
            let line: kvm_irq_level = argument.read().ok()?;
            // SAFETY: both members of the union are 32-bit numbers.
            let gsi = unsafe { line.__bindgen_anon_1.irq };
            Some(format!("{{gsi {gsi}, level {}}}", line.level))
        }
        "KVM_SIGNAL_MSI" => {
            let msi: kvm_msi = argument.read().ok()?;
            Some(format!(
                "{{address {:#x}_{:08x}, data {:#x}}}",
                msi.address_hi, msi.address_lo, msi.data
            ))
        }
        "KVM_GET_REGS" | "KVM_SET_REGS" => {
            let regs: kvm_regs = argument.read().ok()?;
            Some(format!(
                "{{rip {:#x}, rsp {:#x}, rflags {:#x}, …}}",
                regs.rip, regs.rsp, regs.rflags
            ))
        }
        _ => None,
    }
}
