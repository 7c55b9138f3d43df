//! An exit, to be compared, and answered.

use kvm_bindings::*;

use crate::side::Answer;

pub(crate) struct Exit {
    reason: u32,
    flags: [u64; 4],
    detail: String,
}

impl Exit {
    /// Reads the exit out of `kvm_run`, and puts `input` where an answer belongs.
    ///
    /// # Safety
    /// The pages of a vCPU that is not running.
    pub(crate) unsafe fn take(run: *mut kvm_run, input: u64) -> Exit {
        // SAFETY: the caller's promise; all members of the union are plain data.
        unsafe {
            let page = &mut *run;
            let reason = page.exit_reason;
            let union = &mut page.__bindgen_anon_1;
            let detail = match reason {
                KVM_EXIT_IO => {
                    let io = union.io;
                    let len = usize::from(io.size) * io.count as usize;
                    let data = run.cast::<u8>().add(io.data_offset as usize);
                    let data = std::slice::from_raw_parts_mut(data, len);
                    let shown = format!(
                        "port {:#x} size {} count {} dir {}",
                        io.port, io.size, io.count, io.direction
                    );
                    if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                        format!("{shown} {data:x?}")
                    } else {
                        for (byte, answer) in
                            data.iter_mut().zip(input.to_le_bytes().into_iter().cycle())
                        {
                            *byte = answer;
                        }
                        shown
                    }
                }
                KVM_EXIT_MMIO => {
                    let mmio = &mut union.mmio;
                    let len = (mmio.len as usize).min(8);
                    let shown = format!(
                        "gpa {:#x} len {} write {}",
                        mmio.phys_addr, mmio.len, mmio.is_write
                    );
                    if mmio.is_write == 0 {
                        mmio.data = input.to_le_bytes();
                        shown
                    } else {
                        format!("{shown} {:x?}", &mmio.data[..len])
                    }
                }
                KVM_EXIT_DEBUG => format!("{:x?}", union.debug.arch),
                KVM_EXIT_IOAPIC_EOI => format!("{}", union.eoi.vector),
                KVM_EXIT_INTERNAL_ERROR => format!("suberror {}", union.internal.suberror),
                KVM_EXIT_HYPERCALL => {
                    format!("{:x?} {:x?}", union.hypercall.nr, union.hypercall.args)
                }
                _ => String::new(),
            };
            Exit {
                reason,
                flags: [
                    u64::from(page.if_flag),
                    u64::from(page.ready_for_interrupt_injection),
                    page.cr8,
                    page.apic_base,
                ],
                detail,
            }
        }
    }

    /// Whether the oracle gave up.
    pub(crate) fn shown(&self, answer: Answer) -> Vec<u8> {
        if answer.is_err() {
            return format!("{answer:?}").into_bytes();
        }
        format!(
            "reason {} {} if/ready/cr8/base {:x?}",
            self.reason, self.detail, self.flags
        )
        .into_bytes()
    }

    /// Whether the guest can't go on.
    pub(crate) fn ends(&self) -> bool {
        matches!(
            self.reason,
            KVM_EXIT_SHUTDOWN | KVM_EXIT_INTERNAL_ERROR | KVM_EXIT_FAIL_ENTRY | KVM_EXIT_HLT
        )
    }
}
