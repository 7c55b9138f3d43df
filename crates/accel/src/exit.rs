//! `struct kvm_run` after `KVM_RUN`, as a Rust enum.
#![expect(
    unsafe_code,
    reason = "kvm_run is a C union, and its data lie at an offset from it"
)]

use std::ptr::NonNull;
use std::slice;

use addr::Gpa;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_BUS_LOCK,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, kvm_debug_exit_arch, kvm_run,
};

/// Why `KVM_RUN` came back (`api.rst`, section 5). Slices point into the `kvm_run` mapping: an
/// answer is written in place and taken up by the next run.
#[derive(Debug)]
#[allow(missing_docs, reason = "KVM's names")]
pub enum Exit<'a> {
    /// `IN`, `INS`: `data` is `count` elements of `size` bytes, to be filled in.
    IoIn {
        port: u16,
        size: u8,
        data: &'a mut [u8],
    },
    /// `OUT`, `OUTS`.
    IoOut { port: u16, size: u8, data: &'a [u8] },
    /// A read from no slot, at most 8 bytes, to be filled in.
    MmioRead { gpa: Gpa, data: &'a mut [u8] },
    /// A write to no slot or to a read-only one.
    MmioWrite { gpa: Gpa, data: &'a [u8] },
    /// `HLT` without an interrupt controller in the accelerator.
    Halt,
    /// Triple fault.
    Shutdown,
    /// An interrupt can be injected now.
    InterruptWindow,
    /// A signal, a kick or `immediate_exit`.
    Interrupted,
    /// A breakpoint or a step that the monitor asked for.
    Debug(kvm_debug_exit_arch),
    /// `VMCALL`: `ret` goes to RAX.
    Hypercall {
        nr: u64,
        args: [u64; 6],
        ret: &'a mut u64,
    },
    /// `RDMSR` of an MSR that the monitor wanted to see; a non-zero `error` gives `#GP`.
    ReadMsr {
        index: u32,
        reason: u32,
        data: &'a mut u64,
        error: &'a mut u8,
    },
    /// `WRMSR` of one.
    WriteMsr {
        index: u32,
        reason: u32,
        data: u64,
        error: &'a mut u8,
    },
    /// End of interrupt for a level-triggered vector, with a split irqchip.
    IoapicEoi { vector: u8 },
    /// CR8 changed (without an interrupt controller in the accelerator).
    SetTpr,
    /// The dirty ring must be harvested.
    DirtyRingFull,
    /// A split lock.
    BusLock,
    /// The host has no memory to give for this range.
    MemoryFault { flags: u64, gpa: Gpa, size: u64 },
    /// Shutdown, reset or crash by a paravirtual call.
    SystemEvent { kind: u32, data: &'a [u64] },
    /// The state can't be entered.
    FailEntry { reason: u64, cpu: u32 },
    /// An instruction or a state that the accelerator can't handle.
    InternalError { suberror: u32, data: &'a [u64] },
    /// Any other `KVM_EXIT_*`.
    Other(u32),
}

/// Reads the exit that `KVM_RUN` left in `run`, a mapping of `size` bytes.
///
/// # Safety
/// `run` points to a mapping of `size` bytes of a vCPU's file descriptor, to which nobody else has a
/// reference while `'a` lasts.
pub unsafe fn decode<'a>(mut run: NonNull<kvm_run>, size: usize) -> Exit<'a> {
    let base = run.cast::<u8>();
    // SAFETY: the caller gives the mapping to us alone; a `kvm_run` is plain old data.
    let run = unsafe { run.as_mut() };
    let union = &mut run.__bindgen_anon_1;
    // SAFETY: `exit_reason` says which member of the union was written; all are plain old data, and
    // the union is initialised memory whatever it says.
    unsafe {
        match run.exit_reason {
            KVM_EXIT_IO => {
                let io = union.io;
                let len = usize::from(io.size) * io.count as usize;
                let Some(data) = window(base, size, io.data_offset, len) else {
                    return Exit::Other(KVM_EXIT_IO);
                };
                port_access(io.port, io.size, u32::from(io.direction), data)
            }
            KVM_EXIT_MMIO => {
                let mmio = &mut union.mmio;
                let gpa = Gpa::new(mmio.phys_addr);
                let len = (mmio.len as usize).min(mmio.data.len());
                let data = &mut mmio.data[..len];
                match mmio.is_write {
                    0 => Exit::MmioRead { gpa, data },
                    _ => Exit::MmioWrite { gpa, data },
                }
            }
            KVM_EXIT_DEBUG => Exit::Debug(union.debug.arch),
            KVM_EXIT_HYPERCALL => Exit::Hypercall {
                nr: union.hypercall.nr,
                args: union.hypercall.args,
                ret: &mut union.hypercall.ret,
            },
            KVM_EXIT_X86_RDMSR => Exit::ReadMsr {
                index: union.msr.index,
                reason: union.msr.reason,
                data: &mut union.msr.data,
                error: &mut union.msr.error,
            },
            KVM_EXIT_X86_WRMSR => Exit::WriteMsr {
                index: union.msr.index,
                reason: union.msr.reason,
                data: union.msr.data,
                error: &mut union.msr.error,
            },
            KVM_EXIT_IOAPIC_EOI => Exit::IoapicEoi {
                vector: union.eoi.vector,
            },
            KVM_EXIT_MEMORY_FAULT => Exit::MemoryFault {
                flags: union.memory_fault.flags,
                gpa: Gpa::new(union.memory_fault.gpa),
                size: union.memory_fault.size,
            },
            KVM_EXIT_SYSTEM_EVENT => {
                let event = &union.system_event;
                let data = &event.__bindgen_anon_1.data;
                Exit::SystemEvent {
                    kind: event.type_,
                    data: &data[..data.len().min(event.ndata as usize)],
                }
            }
            KVM_EXIT_FAIL_ENTRY => Exit::FailEntry {
                reason: union.fail_entry.hardware_entry_failure_reason,
                cpu: union.fail_entry.cpu,
            },
            KVM_EXIT_INTERNAL_ERROR => {
                let internal = &union.internal;
                let data = &internal.data;
                Exit::InternalError {
                    suberror: internal.suberror,
                    data: &data[..data.len().min(internal.ndata as usize)],
                }
            }
            reason => without_data(reason),
        }
    }
}

/// `len` bytes of the mapping from `offset` on, where it holds them.
///
/// # Safety
/// As for [`decode`].
unsafe fn window<'a>(
    base: NonNull<u8>,
    size: usize,
    offset: u64,
    len: usize,
) -> Option<&'a mut [u8]> {
    let offset = usize::try_from(offset).ok()?;
    if offset.checked_add(len)? > size || offset < size_of::<kvm_run>() {
        return None;
    }
    // SAFETY: inside the mapping (checked), behind `kvm_run`, and the caller gives it to us alone.
    Some(unsafe { slice::from_raw_parts_mut(base.add(offset).as_ptr(), len) })
}

fn port_access(port: u16, size: u8, direction: u32, data: &mut [u8]) -> Exit<'_> {
    if direction == KVM_EXIT_IO_OUT {
        Exit::IoOut { port, size, data }
    } else {
        Exit::IoIn { port, size, data }
    }
}

fn without_data<'a>(reason: u32) -> Exit<'a> {
    match reason {
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_IRQ_WINDOW_OPEN => Exit::InterruptWindow,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_SET_TPR => Exit::SetTpr,
        KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
        KVM_EXIT_X86_BUS_LOCK => Exit::BusLock,
        other => Exit::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of `kvm_run` with a page of port data behind it.
    #[repr(C, align(4096))]
    struct Mapping([u8; 8192]);

    fn mapping() -> Box<Mapping> {
        Box::new(Mapping([0; 8192]))
    }

    fn run(mapping: &mut Mapping) -> NonNull<kvm_run> {
        NonNull::from(&mut mapping.0).cast()
    }

    #[test]
    fn port_write_shows_its_bytes() {
        let mut pages = mapping();
        pages.0[4096..4099].copy_from_slice(b"abc");
        let mut at = run(&mut pages);
        // SAFETY: the test's own memory, aligned and large enough.
        let exit = unsafe {
            let r = at.as_mut();
            r.exit_reason = KVM_EXIT_IO;
            r.__bindgen_anon_1.io.direction = KVM_EXIT_IO_OUT as u8;
            r.__bindgen_anon_1.io.size = 1;
            r.__bindgen_anon_1.io.count = 3;
            r.__bindgen_anon_1.io.port = 0x3f8;
            r.__bindgen_anon_1.io.data_offset = 4096;
            decode(at, 8192)
        };
        let Exit::IoOut { port, size, data } = exit else {
            panic!("not a port write: {exit:?}");
        };
        assert_eq!((port, size, data), (0x3f8, 1, &b"abc"[..]));
    }

    #[test]
    fn port_data_outside_the_mapping_are_refused() {
        let mut pages = mapping();
        let mut at = run(&mut pages);
        // SAFETY: as above.
        let exit = unsafe {
            let r = at.as_mut();
            r.exit_reason = KVM_EXIT_IO;
            r.__bindgen_anon_1.io.size = 4;
            r.__bindgen_anon_1.io.count = 2048;
            r.__bindgen_anon_1.io.data_offset = 4096;
            decode(at, 8192)
        };
        assert!(matches!(exit, Exit::Other(KVM_EXIT_IO)), "{exit:?}");
    }

    #[test]
    fn mmio_read_is_answered_in_place() {
        let mut pages = mapping();
        let mut at = run(&mut pages);
        // SAFETY: as above.
        unsafe {
            let r = at.as_mut();
            r.exit_reason = KVM_EXIT_MMIO;
            r.__bindgen_anon_1.mmio.phys_addr = 0xfee0_0000;
            r.__bindgen_anon_1.mmio.len = 4;
            let Exit::MmioRead { gpa, data } = decode(at, 8192) else {
                panic!("not an MMIO read");
            };
            assert_eq!(gpa, Gpa::new(0xfee0_0000));
            data.copy_from_slice(&[1, 2, 3, 4]);
            assert_eq!(
                at.as_ref().__bindgen_anon_1.mmio.data,
                [1, 2, 3, 4, 0, 0, 0, 0]
            );
        }
    }
}
