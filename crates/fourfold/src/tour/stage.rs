//! The machine on which the tour's guest runs: what any monitor does, in the order in which it is
//! done.
#![expect(unsafe_code, reason = "host memory is handed to the guest")]

use std::sync::{Arc, Mutex, PoisonError};

use accel::{Accelerator, Vcpu, Vm};
use addr::{Address, Gpa, Gva, Hva};
use anyhow::{Context, Result};
use kvm_bindings::{
    CpuId, KVM_MEM_LOG_DIRTY_PAGES, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use memory::access;
use memory::pagemap::Pagemap;
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig};
use memory::space::{RegionKind, Space};
use mmu::event::{FaultEvent, Subscriber};
use mmu::{
    Access, GigabytePages, Mmu, MmuConfig, PagingFeatures, PagingPath, PagingRegisters, Vendor,
};
use x86::control::{Cr0, Cr4, Efer};

use super::guest;

/// Everything that exists once the guest could run.
pub(super) struct Stage {
    // The vCPU and the VM use the RAM and are dropped before it.
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) space: Space,
    pub(super) ram: GuestRam,
    pub(super) faults: Faults,
    /// The accelerator's own MMU, or a copy of the slot table where the kernel keeps its own to
    /// itself.
    mmu: Arc<Mmu>,
    features: PagingFeatures,
    pub(super) pagemap: Pagemap,
}

/// The faults that were seen since they were last taken.
#[derive(Clone, Default)]
pub(super) struct Faults(Arc<Mutex<Vec<FaultEvent>>>);

impl Subscriber for Faults {
    fn fault(&self, event: &FaultEvent) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(*event);
    }
}

impl Faults {
    /// Takes them.
    pub(super) fn take(&self) -> Vec<FaultEvent> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Stage {
    /// Allocates the RAM, makes the VM, registers the slot, writes the guest's tables and code, and
    /// sets the vCPU's registers. Nothing has run yet. The guest's loop will read `reads` times.
    pub(super) fn set_up(accelerator: &dyn Accelerator, reads: u32) -> Result<Self> {
        let ram = GuestRam::new(&RamConfig::new(guest::RAM)).context("allocating guest RAM")?;
        let space = Space::new();
        let mut transaction = space.transaction();
        let region = transaction.region("ram", guest::RAM, RegionKind::ram(&ram)?)?;
        transaction.place(space.root(), region, 0, 0)?;
        transaction.commit()?;
        let vm = accelerator.create_vm().context("KVM_CREATE_VM")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = accelerator
            .supported_cpuid()
            .context("KVM_GET_SUPPORTED_CPUID")?;
        vcpu.set_cpuid(&cpuid).context("KVM_SET_CPUID2")?;
        let mmu = match vm.mmu() {
            Some(mmu) => mmu,
            None => copy_of_the_slots(ram.hva())?,
        };
        let stage = Self {
            vcpu,
            vm,
            space,
            ram,
            faults: Faults::default(),
            mmu,
            features: paging_features(&cpuid),
            pagemap: Pagemap::of_self().context("reading the host's page tables")?,
        };
        stage.register_slot(0)?;
        stage.write_guest()?;
        stage.set_registers(reads)?;
        stage
            .mmu
            .set_subscriber(Some(Box::new(stage.faults.clone())));
        Ok(stage)
    }

    /// `KVM_SET_USER_MEMORY_REGION`: all RAM, from guest physical 0.
    fn register_slot(&self, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: guest::RAM,
            userspace_addr: self.ram.hva().raw(),
        };
        // SAFETY: the RAM lives as long as the stage and is used as volatile memory only.
        unsafe { self.vm.set_user_memory_region(&region) }.context("KVM_SET_USER_MEMORY_REGION")
    }

    /// Has the accelerator log writes to the slot from now on.
    pub(super) fn log_writes(&self) -> Result<()> {
        self.register_slot(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// `KVM_GET_DIRTY_LOG`: the frames that were written since it was last asked.
    pub(super) fn dirty_frames(&self) -> Result<Vec<u64>> {
        let pages = guest::RAM / 4096;
        let bitmap = self
            .vm
            .get_dirty_log(0, pages)
            .context("KVM_GET_DIRTY_LOG")?;
        let bits = (0..pages).filter(|n| bitmap[*n as usize / 64] >> (n % 64) & 1 != 0);
        Ok(bits.collect())
    }

    fn write_guest(&self) -> Result<()> {
        for (gpa, entry) in guest::page_tables() {
            access::write(self.hva(gpa), &entry.to_le_bytes())?;
        }
        access::write(self.hva(Gpa::new(guest::CODE.raw())), &guest::code())?;
        Ok(())
    }

    /// Where a guest physical address of RAM lies in this process.
    pub(super) fn hva(&self, gpa: Gpa) -> Hva {
        self.ram.hva().wrapping_add(gpa.raw())
    }

    /// Has the guest begin again, to read from `target`.
    pub(super) fn aim_at(&self, target: Gva) -> Result<()> {
        let mut regs = self.vcpu.get_regs().context("KVM_GET_REGS")?;
        (regs.rip, regs.rbx) = (guest::CODE.raw(), target.raw());
        self.vcpu.set_regs(&regs).context("KVM_SET_REGS")
    }

    /// 64-bit mode with paging, flat segments, no interrupts.
    fn set_registers(&self, reads: u32) -> Result<()> {
        let mut sregs = self.vcpu.get_sregs().context("KVM_GET_SREGS")?;
        let registers = Self::paging_registers();
        (sregs.cr0, sregs.cr3) = (registers.cr0, registers.cr3);
        (sregs.cr4, sregs.efer) = (registers.cr4, registers.efer);
        let data = segment(0x10, 3);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.cs = kvm_segment {
            l: 1,
            db: 0,
            ..segment(8, 11)
        };
        (sregs.gdt, sregs.idt) = (kvm_dtable::default(), kvm_dtable::default());
        self.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let regs = kvm_regs {
            rip: guest::CODE.raw(),
            rflags: 2,
            rbx: guest::CODE.raw(),
            rsi: guest::DEVICE.raw(),
            rbp: guest::BUFFER_VIEW.raw(),
            rdi: reads.into(),
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).context("KVM_SET_REGS")
    }

    fn paging_registers() -> PagingRegisters {
        PagingRegisters {
            cr0: (Cr0::PE | Cr0::ET | Cr0::WP | Cr0::PG).bits(),
            cr3: guest::PML4.raw(),
            cr4: Cr4::PAE.bits(),
            efer: (Efer::LME | Efer::LMA).bits(),
            ..Default::default()
        }
    }

    /// The whole way of an address, as things stand now.
    pub(super) fn explain(&self, gva: Gva, access: Access) -> Result<explain::Chain> {
        let question = explain::Question {
            target: explain::Target::Gva(gva),
            access,
            search: explain::Search::No,
        };
        let sregs = self.vcpu.get_sregs().context("KVM_GET_SREGS")?;
        let registers = PagingRegisters {
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            ..Default::default()
        };
        let own = self.vm.mmu();
        let hidden = || "this KVM's own tables: it keeps them to itself".to_owned();
        let slots = explain::SlotRange::of_table(&self.mmu.slots().snapshot(0));
        let evidence = explain::Evidence {
            slots: &slots,
            bytes: &explain::OwnBytes,
            registers,
            features: self.features,
            vcpu: None,
            tables: own
                .as_ref()
                .map_or_else(|| explain::Tables::Hidden(hidden()), explain::Tables::Ours),
            tlb: None,
            pagemap: &self.pagemap,
        };
        Ok(explain::explain(&evidence, &question)?)
    }

    /// Bytes of the accelerator's own tables, where it shows them.
    pub(super) fn table_bytes(&self) -> Option<usize> {
        self.vm.mmu().map(|mmu| mmu.table_bytes())
    }
}

/// What the guest's CPUID says about paging: MAXPHYADDR, pages of 1 GiB, and whose rules hold for
/// reserved bits.
fn paging_features(cpuid: &CpuId) -> PagingFeatures {
    const VENDOR: u32 = 0;
    const EXTENDED: u32 = 0x8000_0001;
    const ADDRESSES: u32 = 0x8000_0008;
    let leaf = |function| cpuid.as_slice().iter().find(|e| e.function == function);
    let defaults = PagingFeatures::default();
    // "Auth" of "AuthenticAMD".
    let is_amd = leaf(VENDOR).is_some_and(|e| e.ebx == u32::from_le_bytes(*b"Auth"));
    let has_gigabytes = leaf(EXTENDED).is_some_and(|e| e.edx >> 26 & 1 != 0);
    PagingFeatures {
        max_phys_bits: leaf(ADDRESSES).map_or(defaults.max_phys_bits, |e| e.eax as u8),
        gigabyte_pages: if has_gigabytes {
            GigabytePages::Supported
        } else {
            GigabytePages::Reserved
        },
        vendor: if is_amd { Vendor::Amd } else { Vendor::Intel },
    }
}

/// What is known from outside of a KVM that keeps its tables to itself: the slot, and the guest's
/// tables in RAM. The direct path has no tables of its own, so nothing is shown that is not there.
fn copy_of_the_slots(ram: Hva) -> Result<Arc<Mmu>> {
    let slots = Slots::new(Domain::new(), SlotsConfig::default());
    slots.set_region(&Region {
        slot: 0,
        flags: 0,
        gpa: Gpa::new(0),
        size: guest::RAM,
        hva: ram,
    })?;
    let path = PagingPath::Direct;
    Ok(Mmu::new(
        &slots,
        MmuConfig {
            path,
            ..Default::default()
        },
    ))
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: u32::MAX,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    }
}
