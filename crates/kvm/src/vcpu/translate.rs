//! `KVM_TRANSLATE`, `KVM_PRE_FAULT_MEMORY`, and what the guest's CPUID says about paging.

use addr::{Gpa, Gva};
use kvm_bindings::{kvm_pre_fault_memory, kvm_translation};
use mmu::{
    Access, AccessKind, GigabytePages, PagingFeatures, PagingRegisters, Privilege, VcpuMmu, Vendor,
};

use super::{Machine, Vcpu};
use crate::cpuid::Bit;
use crate::errno::Errno;
use x86::paging::PagingMode;

const PAGE: u64 = 4096;
/// What kvm.ko answers for an address that leads nowhere.
const NOWHERE: u64 = !0;

impl Vcpu {
    /// What the walker must know of the guest's CPU.
    pub(super) fn paging_features(&self, machine: &Machine) -> PagingFeatures {
        let cpuid = &machine.cpuid;
        let bits = if cpuid.entries().is_empty() {
            self.vm().slots().config().physical_bits
        } else {
            cpuid.physical_bits()
        };
        PagingFeatures {
            max_phys_bits: bits as u8,
            gigabyte_pages: if cpuid.entries().is_empty() || cpuid.has(Bit::GIGABYTE_PAGES) {
                GigabytePages::Supported
            } else {
                GigabytePages::Reserved
            },
            vendor: if cpuid.is_amd() {
                Vendor::Amd
            } else {
                Vendor::Intel
            },
        }
    }

    /// `KVM_TRANSLATE`: what the guest's tables say to a supervisor's read, without side effects:
    /// kvm.ko marks the entries accessed, which the guest would take for its own doing.
    pub fn translate(&self, gva: Gva) -> kvm_translation {
        let inner = self.lock();
        let state = inner.core.state();
        let mut mmu = VcpuMmu::new(self.vm().mmu(), self.id());
        // A fresh MMU has nothing to flush.
        let _ = mmu.set_features(self.paging_features(&inner.machine));
        let _ = mmu.set_registers(&PagingRegisters {
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.msrs.efer,
            pdptrs: state.pdptrs,
            pkru: state.pkru,
        });
        let access = Access::new(AccessKind::Read, Privilege::SupervisorAcSet);
        let found = match mmu.regime().mode() {
            // As given, even where no such address exists; all ones is kvm.ko's "none".
            PagingMode::Off => gva.raw(),
            _ => mmu
                .probe(gva, access, &mut ())
                .map_or(NOWHERE, |probe| probe.page.gpa.raw()),
        };
        kvm_translation {
            linear_address: gva.raw(),
            physical_address: found,
            valid: u8::from(found != NOWHERE),
            writeable: 1,
            usermode: 0,
            pad: [0; 5],
        }
    }

    /// What the CPU's TLB holds for an address.
    pub fn tlb(&self, gva: Gva, privilege: Privilege) -> Option<cpu::TlbEntry> {
        self.lock().core.engine_mut()?.tlb(gva, privilege)
    }

    /// `KVM_PRE_FAULT_MEMORY`: has the host provide the pages now; `range` is what is left. Our
    /// second level is filled at the first access, at little cost once the host has the page.
    pub fn pre_fault_memory(&self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        let end = range.gpa.wrapping_add(range.size);
        let whole = range.gpa.is_multiple_of(PAGE) && range.size.is_multiple_of(PAGE);
        if range.flags != 0 || !whole || end <= range.gpa {
            return Err(Errno::EINVAL);
        }
        let _inner = self.lock();
        let all = range.size;
        let table = self.vm().slots().snapshot(0);
        while range.size > 0 {
            let gpa = Gpa::new(range.gpa);
            let hva = table.find(gpa.frame()).and_then(|slot| slot.hva_at(gpa));
            let touched = hva
                .ok_or(Errno::ENOENT)
                .and_then(|hva| memory::access::load(hva, 1).map_err(|_| Errno::EFAULT));
            if let Err(errno) = touched {
                return if range.size == all {
                    Err(errno)
                } else {
                    Ok(())
                };
            }
            range.gpa += PAGE;
            range.size -= PAGE;
        }
        Ok(())
    }
}
