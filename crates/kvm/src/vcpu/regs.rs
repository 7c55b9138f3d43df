//! `KVM_GET_REGS`, `KVM_SET_REGS`, `KVM_GET_SREGS` and its kin (`arch/x86/kvm/regs.c`).

use cpu::CpuState;
use cpu::state::gpr;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_regs, kvm_sregs, kvm_sregs2,
};
use x86::control::{Cr0, Cr4, Efer};
use x86::rflags;

use super::segments::{from_kvm, table_from_kvm, table_to_kvm, to_kvm};
use super::{Inner, Vcpu, control};
use crate::errno::Errno;

/// General registers as KVM shows them.
pub(crate) fn get_regs(state: &CpuState) -> kvm_regs {
    let g = &state.gpr;
    kvm_regs {
        rax: g[gpr::RAX],
        rbx: g[gpr::RBX],
        rcx: g[gpr::RCX],
        rdx: g[gpr::RDX],
        rsi: g[gpr::RSI],
        rdi: g[gpr::RDI],
        rsp: g[gpr::RSP],
        rbp: g[gpr::RBP],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: state.rip,
        rflags: state.rflags,
    }
}

/// Takes general registers over. An exception that was still to be delivered is forgotten: it
/// belonged to the state before.
pub(crate) fn set_regs(state: &mut CpuState, regs: &kvm_regs) {
    let r = regs;
    state.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    state.rip = r.rip;
    state.rflags = r.rflags & (rflags::ALL | rflags::FIXED) | rflags::FIXED;
    if !state.events.exception_injected {
        state.events.exception = None;
    }
}

/// Whether PAE paging is on, whose top entries are registers.
fn is_pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & Cr0::PG.bits() != 0 && cr4 & Cr4::PAE.bits() != 0 && efer & Efer::LMA.bits() == 0
}

/// The part of `kvm_sregs` that is before its bitmap is the whole of `kvm_sregs2` but the PDPTEs.
fn without_pdptrs(sregs: &kvm_sregs2) -> kvm_sregs {
    kvm_sregs {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

impl Vcpu {
    /// `KVM_GET_REGS`.
    pub fn get_regs(&self) -> kvm_regs {
        get_regs(self.lock().core.state())
    }

    /// `KVM_SET_REGS`.
    pub fn set_regs(&self, regs: &kvm_regs) {
        set_regs(self.lock().core.state_mut(), regs);
    }

    /// `KVM_GET_SREGS`.
    pub fn get_sregs(&self) -> kvm_sregs {
        self.sregs_of(&self.lock())
    }

    /// `KVM_SET_SREGS`.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.take_sregs(&mut self.lock(), sregs)
    }

    pub(crate) fn sregs_of(&self, inner: &Inner) -> kvm_sregs {
        let mut sregs = self.common_sregs(inner);
        if let Some(interrupt) = inner.core.state().events.interrupt.filter(|i| !i.soft) {
            let vector = usize::from(interrupt.vector);
            sregs.interrupt_bitmap[vector / 64] |= 1 << (vector % 64);
        }
        sregs
    }

    fn common_sregs(&self, inner: &Inner) -> kvm_sregs {
        let state = inner.core.state();
        let s = &state.segments;
        kvm_sregs {
            cs: to_kvm(&s.cs),
            ds: to_kvm(&s.ds),
            es: to_kvm(&s.es),
            fs: to_kvm(&s.fs),
            gs: to_kvm(&s.gs),
            ss: to_kvm(&s.ss),
            tr: to_kvm(&s.tr),
            ldt: to_kvm(&s.ldtr),
            gdt: table_to_kvm(state.gdtr),
            idt: table_to_kvm(state.idtr),
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: u64::from(self.task_priority(&inner.machine)),
            efer: state.msrs.efer,
            apic_base: self.apic_base(&inner.machine),
            interrupt_bitmap: [0; 4],
        }
    }

    pub(crate) fn take_sregs(&self, inner: &mut Inner, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.take_common(inner, sregs, Pdptrs::Reload)?;
        let bitmap = &sregs.interrupt_bitmap;
        let vector = (0..256).find(|v| bitmap[v / 64] >> (v % 64) & 1 != 0);
        if let Some(vector) = vector {
            inner.core.state_mut().events.interrupt = Some(cpu::InjectedInterrupt {
                vector: vector as u8,
                soft: false,
            });
        }
        Ok(())
    }

    /// `KVM_GET_SREGS2`.
    pub fn get_sregs2(&self) -> kvm_sregs2 {
        let inner = self.lock();
        let s = self.common_sregs(&inner);
        let state = inner.core.state();
        let mut sregs = kvm_sregs2 {
            cs: s.cs,
            ds: s.ds,
            es: s.es,
            fs: s.fs,
            gs: s.gs,
            ss: s.ss,
            tr: s.tr,
            ldt: s.ldt,
            gdt: s.gdt,
            idt: s.idt,
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            flags: 0,
            pdptrs: [0; 4],
        };
        if is_pae_paging(s.cr0, s.cr4, s.efer) {
            sregs.flags = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
            sregs.pdptrs = state.pdptrs;
        }
        sregs
    }

    /// `KVM_SET_SREGS2`.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<(), Errno> {
        let valid = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        let has_pdptrs = sregs.flags & valid != 0;
        let pae = is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer);
        if sregs.flags & !valid != 0 || has_pdptrs && !pae {
            return Err(Errno::EINVAL);
        }
        let pdptrs = if has_pdptrs {
            Pdptrs::Given(sregs.pdptrs)
        } else {
            Pdptrs::Reload
        };
        self.take_common(&mut self.lock(), &without_pdptrs(sregs), pdptrs)
    }

    fn take_common(
        &self,
        inner: &mut Inner,
        sregs: &kvm_sregs,
        pdptrs: Pdptrs,
    ) -> Result<(), Errno> {
        if !control::sregs_are_valid(sregs, &inner.machine.cpuid) {
            return Err(Errno::EINVAL);
        }
        self.set_apic_base(&mut inner.machine, sregs.apic_base)?;
        let state = inner.core.state_mut();
        write_control(state, sregs);
        write_segments(state, sregs);
        if is_pae_paging(sregs.cr0, sregs.cr4, sregs.efer) {
            state.pdptrs = match pdptrs {
                Pdptrs::Given(entries) => entries,
                Pdptrs::Reload => self.load_pdptrs(sregs.cr3).unwrap_or(state.pdptrs),
            };
        }
        // CR8 has four bits; what doesn't fit is ignored, as the kernel ignores the failure.
        if sregs.cr8 <= 15 {
            self.set_task_priority(&mut inner.machine, sregs.cr8 as u8);
        }
        self.unhalt_at_reset_vector(inner);
        self.mirror_cpuid(inner);
        Ok(())
    }

    /// Monitors of old don't say that a vCPU runs again after a reset; they put the bootstrap
    /// processor back to the reset vector.
    fn unhalt_at_reset_vector(&self, inner: &mut Inner) {
        let state = inner.core.state();
        let cs = &state.segments.cs;
        let at_reset = state.rip == 0xfff0 && cs.selector == 0xf000 && cs.base == 0xffff_0000;
        if self.is_bootstrap() && at_reset && state.cr0 & Cr0::PE.bits() == 0 {
            inner.machine.mp_state = KVM_MP_STATE_RUNNABLE;
        }
    }

    /// The four entries that CR3 points to in PAE paging, where all are valid.
    fn load_pdptrs(&self, cr3: u64) -> Option<[u64; 4]> {
        let mut entries = [0; 4];
        for (i, entry) in entries.iter_mut().enumerate() {
            let gpa = addr::Gpa::new((cr3 & 0xffff_ffe0) + 8 * i as u64);
            *entry = self.vm().read_guest_u64(gpa)?;
        }
        let reserved = x86::paging::PDPTE_RESERVED_LOW;
        let valid = entries.iter().all(|e| e & 1 == 0 || e & reserved == 0);
        valid.then_some(entries)
    }
}

/// Where the PDPTEs come from.
#[derive(Clone, Copy)]
enum Pdptrs {
    /// From memory at CR3.
    Reload,
    /// From the monitor.
    Given([u64; 4]),
}

fn write_control(state: &mut CpuState, sregs: &kvm_sregs) {
    state.gdtr = table_from_kvm(&sregs.gdt);
    state.idtr = table_from_kvm(&sregs.idt);
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr0 = sregs.cr0 | Cr0::ET.bits();
    state.cr4 = sregs.cr4;
    state.msrs.efer = sregs.efer;
}

fn write_segments(state: &mut CpuState, sregs: &kvm_sregs) {
    let s = &mut state.segments;
    s.cs = from_kvm(&sregs.cs);
    s.ds = from_kvm(&sregs.ds);
    s.es = from_kvm(&sregs.es);
    s.fs = from_kvm(&sregs.fs);
    s.gs = from_kvm(&sregs.gs);
    s.ss = from_kvm(&sregs.ss);
    s.tr = from_kvm(&sregs.tr);
    s.ldtr = from_kvm(&sregs.ldt);
}
