//! Why `KVM_RUN` came back: read from the `kvm_run` that the program has mapped, ours or the kernel's.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use kvm::Argument;
use kvm_bindings as kb;

/// Where each vCPU's descriptor was mapped.
static MAPPED: Mutex<Option<HashMap<c_int, u64>>> = Mutex::new(None);

/// The program has mapped the first pages of a descriptor.
pub(crate) fn mapped(fd: c_int, at: *mut c_void) {
    let mut mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    mapped.get_or_insert_default().insert(fd, at as u64);
}

fn kvm_run(fd: c_int) -> Option<Argument> {
    let mapped = MAPPED.lock().unwrap_or_else(PoisonError::into_inner);
    mapped.as_ref()?.get(&fd).map(|at| Argument::new(*at))
}

/// The exit's number, after a call that succeeded.
pub(crate) fn reason(fd: c_int) -> Option<u32> {
    let run = kvm_run(fd)?;
    run.offset(std::mem::offset_of!(kb::kvm_run, exit_reason))
        .read()
        .ok()
}

const NAMES: &[(u32, &str)] = &[
    (kb::KVM_EXIT_UNKNOWN, "UNKNOWN"),
    (kb::KVM_EXIT_IO, "IO"),
    (kb::KVM_EXIT_HYPERCALL, "HYPERCALL"),
    (kb::KVM_EXIT_DEBUG, "DEBUG"),
    (kb::KVM_EXIT_HLT, "HLT"),
    (kb::KVM_EXIT_MMIO, "MMIO"),
    (kb::KVM_EXIT_IRQ_WINDOW_OPEN, "IRQ_WINDOW_OPEN"),
    (kb::KVM_EXIT_SHUTDOWN, "SHUTDOWN"),
    (kb::KVM_EXIT_FAIL_ENTRY, "FAIL_ENTRY"),
    (kb::KVM_EXIT_INTR, "INTR"),
    (kb::KVM_EXIT_SET_TPR, "SET_TPR"),
    (kb::KVM_EXIT_TPR_ACCESS, "TPR_ACCESS"),
    (kb::KVM_EXIT_INTERNAL_ERROR, "INTERNAL_ERROR"),
    (kb::KVM_EXIT_SYSTEM_EVENT, "SYSTEM_EVENT"),
    (kb::KVM_EXIT_IOAPIC_EOI, "IOAPIC_EOI"),
    (kb::KVM_EXIT_X86_RDMSR, "X86_RDMSR"),
    (kb::KVM_EXIT_X86_WRMSR, "X86_WRMSR"),
    (kb::KVM_EXIT_DIRTY_RING_FULL, "DIRTY_RING_FULL"),
    (kb::KVM_EXIT_X86_BUS_LOCK, "X86_BUS_LOCK"),
    (kb::KVM_EXIT_MEMORY_FAULT, "MEMORY_FAULT"),
];

/// The name of an exit.
pub(crate) fn name(reason: u32) -> String {
    let row = NAMES.iter().find(|(number, _)| *number == reason);
    row.map_or_else(
        || format!("KVM_EXIT_{reason}"),
        |(_, name)| format!("KVM_EXIT_{name}"),
    )
}

/// The exit with what belongs to it; `None` after a call that failed, or of a vCPU whose pages the
/// program has not mapped.
pub(super) fn of(fd: c_int, result: c_int) -> Option<String> {
    if result < 0 {
        return None;
    }
    let reason = reason(fd)?;
    let run = kvm_run(fd)?;
    let details = run.offset(std::mem::offset_of!(kb::kvm_run, __bindgen_anon_1));
    let details = text(reason, details).unwrap_or_default();
    Some(format!("{}{details}", name(reason)))
}

/// The structures of the union in `struct kvm_run`.
fn text(reason: u32, at: Argument) -> Option<String> {
    let word = |offset| at.offset(offset).read::<u32>().ok();
    let long = |offset| at.offset(offset).read::<u64>().ok();
    Some(match reason {
        kb::KVM_EXIT_IO => {
            // Direction and size, a byte each; port; count.
            let [kind, count] = [word(0)?, word(4)?];
            let way = if kind & 0xff == kb::KVM_EXIT_IO_OUT {
                "out"
            } else {
                "in"
            };
            let (size, port) = (kind >> 8 & 0xff, kind >> 16);
            format!(" {{{way}, port {port:#x}, size {size}, count {count}}}")
        }
        kb::KVM_EXIT_MMIO => {
            // Address, eight bytes of data, length, and whether it is a write.
            let (gpa, len) = (long(0)?, word(16)?.min(8) as usize);
            if word(20)? & 0xff != 0 {
                let data = &long(8)?.to_le_bytes()[..len];
                format!(" {{write, gpa {gpa:#x}, data {data:02x?}}}")
            } else {
                format!(" {{read, gpa {gpa:#x}, len {len}}}")
            }
        }
        kb::KVM_EXIT_INTERNAL_ERROR => format!(" {{suberror {}}}", word(0)?),
        kb::KVM_EXIT_SYSTEM_EVENT => format!(" {{type {}}}", word(0)?),
        kb::KVM_EXIT_FAIL_ENTRY => format!(" {{reason {:#x}}}", long(0)?),
        kb::KVM_EXIT_HYPERCALL => format!(" {{nr {}}}", long(0)?),
        kb::KVM_EXIT_X86_RDMSR => format!(" {{msr {:#x}}}", word(12)?),
        kb::KVM_EXIT_X86_WRMSR => format!(" {{msr {:#x}, data {:#x}}}", word(12)?, long(16)?),
        kb::KVM_EXIT_DEBUG => format!(" {{exception {}, rip {:#x}}}", word(0)?, long(8)?),
        kb::KVM_EXIT_MEMORY_FAULT => format!(" {{gpa {:#x}}}", long(8)?),
        _ => return None,
    })
}
