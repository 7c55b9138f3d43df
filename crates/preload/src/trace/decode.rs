//! What a call's argument points to: the structures of `linux/kvm.h`, as far as they say most of
//! the story. Structures that the kernel fills in are shown as they came back.

use std::fmt::Write as _;

use kvm::Argument;
use kvm::table::CAPABILITIES;
use kvm_bindings as kb;

/// Entries of a list that are shown.
const SHOWN: u32 = 8;

/// The argument of a call, decoded; `None` where it is a number, or can't be read.
pub(super) fn argument(name: &str, argument: Argument) -> Option<String> {
    memory(name, argument)
        .or_else(|| registers(name, argument))
        .or_else(|| interrupts(name, argument))
        .or_else(|| lists(name, argument))
}

fn capability(number: u64) -> String {
    let row = CAPABILITIES
        .iter()
        .find(|row| u64::from(row.number) == number);
    row.map_or_else(|| number.to_string(), |row| row.name.to_owned())
}

fn memory(name: &str, argument: Argument) -> Option<String> {
    Some(match name {
        "KVM_CHECK_EXTENSION" => capability(argument.value()),
        "KVM_SET_USER_MEMORY_REGION" | "KVM_SET_USER_MEMORY_REGION2" => {
            let r: kb::kvm_userspace_memory_region = argument.read().ok()?;
            format!(
                "{{slot {:#x}, flags {:#x}, gpa {:#x}, size {:#x}, hva {:#x}}}",
                r.slot, r.flags, r.guest_phys_addr, r.memory_size, r.userspace_addr
            )
        }
        "KVM_GET_DIRTY_LOG" => {
            let log: kb::kvm_dirty_log = argument.read().ok()?;
            format!("{{slot {:#x}}}", log.slot)
        }
        "KVM_CLEAR_DIRTY_LOG" => {
            let log: kb::kvm_clear_dirty_log = argument.read().ok()?;
            format!(
                "{{slot {:#x}, first page {:#x}, pages {:#x}}}",
                log.slot, log.first_page, log.num_pages
            )
        }
        "KVM_ENABLE_CAP" => {
            let cap: kb::kvm_enable_cap = argument.read().ok()?;
            format!(
                "{{{}, args {:x?}}}",
                capability(u64::from(cap.cap)),
                cap.args
            )
        }
        "KVM_TRANSLATE" => {
            let t: kb::kvm_translation = argument.read().ok()?;
            format!(
                "{{gva {:#x}, gpa {:#x}, valid {}}}",
                t.linear_address, t.physical_address, t.valid
            )
        }
        "KVM_SET_CLOCK" | "KVM_GET_CLOCK" => {
            let clock: kb::kvm_clock_data = argument.read().ok()?;
            format!("{{clock {} ns, flags {:#x}}}", clock.clock, clock.flags)
        }
        _ => return None,
    })
}

fn segment(name: &str, s: &kb::kvm_segment) -> String {
    format!(
        "{name} {:#x} base {:#x} limit {:#x} type {:#x}",
        s.selector, s.base, s.limit, s.type_
    )
}

fn registers(name: &str, argument: Argument) -> Option<String> {
    Some(match name {
        "KVM_GET_REGS" | "KVM_SET_REGS" => {
            let r: kb::kvm_regs = argument.read().ok()?;
            format!(
                "{{rip {:#x}, rflags {:#x}, rax {:#x}, rbx {:#x}, rcx {:#x}, rdx {:#x}, rsi {:#x}, \
                 rdi {:#x}, rsp {:#x}, rbp {:#x}, r8 {:#x}, r9 {:#x}, r10 {:#x}, r11 {:#x}, \
                 r12 {:#x}, r13 {:#x}, r14 {:#x}, r15 {:#x}}}",
                r.rip,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rsp,
                r.rbp,
                r.r8,
                r.r9,
                r.r10,
                r.r11,
                r.r12,
                r.r13,
                r.r14,
                r.r15
            )
        }
        "KVM_GET_SREGS" | "KVM_SET_SREGS" => {
            let s: kb::kvm_sregs = argument.read().ok()?;
            format!(
                "{{cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, cr8 {:#x}, efer {:#x}, apic base \
                 {:#x}, {}, {}, gdt {:#x}, idt {:#x}}}",
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.cr8,
                s.efer,
                s.apic_base,
                segment("cs", &s.cs),
                segment("ss", &s.ss),
                s.gdt.base,
                s.idt.base
            )
        }
        "KVM_GET_MP_STATE" | "KVM_SET_MP_STATE" => {
            let state: kb::kvm_mp_state = argument.read().ok()?;
            format!("{{mp state {}}}", state.mp_state)
        }
        "KVM_GET_VCPU_EVENTS" | "KVM_SET_VCPU_EVENTS" => {
            let e: kb::kvm_vcpu_events = argument.read().ok()?;
            format!(
                "{{exception {} (injected {}), interrupt {} (injected {}), nmi pending {}, flags \
                 {:#x}}}",
                e.exception.nr,
                e.exception.injected,
                e.interrupt.nr,
                e.interrupt.injected,
                e.nmi.pending,
                e.flags
            )
        }
        "KVM_SET_GUEST_DEBUG" => {
            let debug: kb::kvm_guest_debug = argument.read().ok()?;
            format!("{{control {:#x}}}", debug.control)
        }
        _ => return None,
    })
}

fn interrupts(name: &str, argument: Argument) -> Option<String> {
    Some(match name {
        "KVM_IRQ_LINE" | "KVM_IRQ_LINE_STATUS" => {
            let [gsi, level]: [u32; 2] = argument.read_slice(2).ok()?.try_into().ok()?;
            format!("{{gsi {gsi}, level {level}}}")
        }
        "KVM_INTERRUPT" => {
            let interrupt: kb::kvm_interrupt = argument.read().ok()?;
            format!("{{vector {}}}", interrupt.irq)
        }
        "KVM_SIGNAL_MSI" => {
            let msi: kb::kvm_msi = argument.read().ok()?;
            format!(
                "{{address {:#x}_{:08x}, data {:#x}}}",
                msi.address_hi, msi.address_lo, msi.data
            )
        }
        "KVM_IRQFD" => {
            let irq: kb::kvm_irqfd = argument.read().ok()?;
            format!(
                "{{fd {}, gsi {}, flags {:#x}}}",
                irq.fd.cast_signed(),
                irq.gsi,
                irq.flags
            )
        }
        "KVM_IOEVENTFD" => {
            let io: kb::kvm_ioeventfd = argument.read().ok()?;
            format!(
                "{{address {:#x}, len {}, fd {}, flags {:#x}, datamatch {:#x}}}",
                io.addr, io.len, io.fd, io.flags, io.datamatch
            )
        }
        "KVM_CREATE_DEVICE" => {
            let device: kb::kvm_create_device = argument.read().ok()?;
            format!("{{type {}, flags {:#x}}}", device.type_, device.flags)
        }
        "KVM_GET_IRQCHIP" | "KVM_SET_IRQCHIP" => {
            let chip: u32 = argument.read().ok()?;
            format!("{{chip {chip}}}")
        }
        "KVM_SET_GSI_ROUTING" => {
            let count: u32 = argument.read().ok()?;
            format!("{{{count} routes}}")
        }
        _ => return None,
    })
}

fn lists(name: &str, argument: Argument) -> Option<String> {
    let count: u32 = match name {
        "KVM_GET_MSRS"
        | "KVM_SET_MSRS"
        | "KVM_SET_CPUID2"
        | "KVM_GET_CPUID2"
        | "KVM_GET_SUPPORTED_CPUID"
        | "KVM_GET_EMULATED_CPUID"
        | "KVM_GET_MSR_INDEX_LIST"
        | "KVM_GET_MSR_FEATURE_INDEX_LIST" => argument.read().ok()?,
        _ => return None,
    };
    let mut text = format!("{{{count} entries");
    if matches!(name, "KVM_GET_MSRS" | "KVM_SET_MSRS") {
        let entries: Vec<kb::kvm_msr_entry> = argument
            .offset(8)
            .read_slice(count.min(SHOWN) as usize)
            .ok()?;
        for entry in entries {
            // Writing to a String can't fail.
            let _ = write!(text, ", {:#x}: {:#x}", entry.index, entry.data);
        }
        if count > SHOWN {
            text.push_str(", …");
        }
    }
    text.push('}');
    Some(text)
}
