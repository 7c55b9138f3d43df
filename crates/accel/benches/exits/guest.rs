//! Small guests in 64-bit mode: all of 4 GiB mapped one to one, x2APIC on, an interrupt table.

use std::sync::Arc;

use accel::{Accelerator, Vcpu, Vm};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// Where things are in the guest's memory.
const IDT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const TABLES: u64 = 0x1_0000;
pub(crate) const CODE: u64 = 0x2_0000;
pub(crate) const HANDLER: u64 = 0x2_8000;
/// A word that guests count in.
pub(crate) const COUNTER: u64 = 0x3_0000;
const MEMORY: usize = 0x10_0000;

/// The vector that interrupts.
pub(crate) const VECTOR: u8 = 0x40;
/// Its GSI.
pub(crate) const GSI: u32 = 24;

/// One machine.
pub(crate) struct Guest {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
    // After the VM, which uses it.
    memory: MmapRegion,
}

impl Guest {
    /// Every vCPU runs `code` of its own; `handler` runs at each interrupt.
    pub(crate) fn new(
        accelerator: &dyn Accelerator,
        chips: Chips,
        codes: &[&[u8]],
        handler: &[u8],
    ) -> Guest {
        let memory = MmapRegion::<()>::new(MEMORY).expect("a megabyte");
        let vm = accelerator.create_vm().expect("a VM");
        chips.create(&*vm);
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the memory lives as long as the VM, and is accessed as volatile memory only.
        unsafe { vm.set_user_memory_region(&region).expect("a slot") };
        let mut guest = Guest {
            vm,
            vcpus: Vec::new(),
            memory,
        };
        guest.write_tables(handler);
        for (id, code) in codes.iter().enumerate() {
            let start = CODE + 0x1000 * id as u64;
            guest.write(start, code);
            let vcpu = guest.vm.create_vcpu(id as u64).expect("a vCPU");
            let cpuid = accelerator.supported_cpuid().expect("a CPUID");
            vcpu.set_cpuid(&cpuid).expect("the CPUID");
            enter_long_mode(&*vcpu, start, 0x4_0000 + 0x1000 * (id as u64 + 1));
            guest.vcpus.push(vcpu);
        }
        guest
    }

    fn slice(&self) -> VolatileSlice<'_> {
        self.memory.as_volatile_slice()
    }

    /// All of its memory, as the monitor's own threads have it.
    #[allow(
        dead_code,
        reason = "not every program that includes this file does so"
    )]
    pub(crate) fn memory(&self) -> &MmapRegion {
        &self.memory
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.slice()
            .subslice(at as usize, bytes.len())
            .expect("in memory")
            .copy_from(bytes);
    }

    /// Replaces the code of a vCPU.
    #[allow(
        dead_code,
        reason = "not every program that includes this file does so"
    )]
    pub(crate) fn reload(&self, vcpu: u64, code: &[u8]) {
        self.write(CODE + 0x1000 * vcpu, code);
    }

    fn write_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    fn write_tables(&self, handler: &[u8]) {
        const PRESENT_WRITABLE: u64 = 3;
        const LARGE: u64 = 1 << 7;
        self.write_u64(TABLES, (TABLES + 0x1000) | PRESENT_WRITABLE);
        for gib in 0..4 {
            let directory = TABLES + 0x2000 + 0x1000 * gib;
            self.write_u64(TABLES + 0x1000 + 8 * gib, directory | PRESENT_WRITABLE);
            for page in 0..512 {
                let address = (gib << 30) | (page << 21);
                self.write_u64(directory + 8 * page, address | LARGE | PRESENT_WRITABLE);
            }
        }
        // Null, 64-bit code, data.
        self.write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
        self.write_u64(GDT + 16, 0x00cf_9300_0000_ffff);
        // One gate for all vectors: present interrupt gate, selector 8.
        for vector in 0..256 {
            self.write_u64(
                IDT + 16 * vector,
                0x0000_8e00_0008_0000 | (HANDLER & 0xffff) | (HANDLER >> 16 << 48),
            );
        }
        self.write(HANDLER, handler);
    }
}

/// Which interrupt controllers the accelerator has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    dead_code,
    reason = "not every program that includes this file needs all"
)]
pub(crate) enum Chips {
    /// All of them, and the standard routes.
    All,
    /// All of them, and [`GSI`] is a message to vCPU 0.
    Message,
    /// Local APICs only; [`GSI`] is a level-triggered message to vCPU 0.
    Split,
    /// None: they are the monitor's affair.
    None,
}

impl Chips {
    fn create(self, vm: &dyn Vm) {
        if self == Chips::None {
            return;
        }
        if self == Chips::Split {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                ..Default::default()
            };
            cap.args[0] = 32;
            vm.enable_cap(&cap).expect("local APICs");
        } else {
            vm.create_irqchip().expect("interrupt controllers");
        }
        let level = if self == Chips::Split { 0xc000 } else { 0 };
        let mut entry = kvm_irq_routing_entry {
            gsi: GSI,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: 0xfee0_0000,
            data: u32::from(VECTOR) | level,
            ..Default::default()
        };
        if self != Chips::All {
            vm.set_gsi_routing(&[entry]).expect("a route");
        }
    }
}

fn segment(selector: u16, type_: u8, long: u8) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        l: long,
        db: 1 - long,
        ..Default::default()
    }
}

fn enter_long_mode(vcpu: &dyn Vcpu, rip: u64, rsp: u64) {
    let mut sregs = vcpu.get_sregs().expect("sregs");
    sregs.cs = segment(8, 11, 1);
    for data in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *data = segment(16, 3, 0);
    }
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: 23,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: IDT,
        limit: 0xfff,
        ..Default::default()
    };
    sregs.cr3 = TABLES;
    sregs.cr0 = 0x8000_0031;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    sregs.apic_base |= 0xc00;
    vcpu.set_sregs(&sregs).expect("long mode");
    let regs = kvm_regs {
        rip,
        rsp,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).expect("registers");
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
    .expect("runnable");
}
