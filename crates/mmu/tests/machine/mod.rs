//! A machine without a CPU: RAM, slots, an MMU and one vCPU's side of it.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unreachable_pub, reason = "shared by test files")]

pub mod cpu;

use std::sync::Arc;

use addr::{Address, Gpa, Hva};
use memory::access;
use memory::quiesce::{Domain, Kick, Participant, Requests};
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Change, Region, SlotError, SlotFlags, Slots, SlotsConfig};
use mmu::{Access, AccessKind, Mmu, MmuConfig, PagingPath, PagingRegisters, Privilege, VcpuMmu};
use x86::control::{Cr0, Cr4, Efer};

pub const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
pub const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);
pub const EXECUTE: Access = Access::new(AccessKind::Execute, Privilege::Supervisor);

pub const PATHS: [PagingPath; 3] = [PagingPath::Nested, PagingPath::Shadow, PagingPath::Direct];

pub struct Machine {
    pub ram: GuestRam,
    pub domain: Arc<Domain>,
    pub slots: Arc<Slots>,
    pub mmu: Arc<Mmu>,
    pub vcpu: VcpuMmu,
}

impl Machine {
    /// RAM of `bytes` bytes, in no slot yet.
    pub fn without_slots(path: PagingPath, bytes: u64) -> Self {
        let config = MmuConfig {
            path,
            ..MmuConfig::default()
        };
        Self::bare(config, bytes)
    }

    fn bare(config: MmuConfig, bytes: u64) -> Self {
        let ram = GuestRam::new(&RamConfig::new(bytes)).expect("RAM");
        let domain = Domain::new();
        let slots = Slots::new(Arc::clone(&domain), SlotsConfig::default());
        let mmu = Mmu::new(&slots, config);
        let vcpu = VcpuMmu::new(&mmu, 0);
        Self {
            ram,
            domain,
            slots,
            mmu,
            vcpu,
        }
    }

    /// RAM of `bytes` bytes from guest physical address 0.
    pub fn new(path: PagingPath, bytes: u64) -> Self {
        let config = MmuConfig {
            path,
            ..MmuConfig::default()
        };
        Self::with_config(config, bytes)
    }

    /// The same, with a configuration of the test's own.
    pub fn with_config(config: MmuConfig, bytes: u64) -> Self {
        let machine = Self::bare(config, bytes);
        machine
            .slot(0, Gpa::new(0), 0, bytes, SlotFlags::empty())
            .expect("a slot for all RAM");
        machine
    }

    /// A slot of `bytes` bytes from `offset` into RAM.
    pub fn slot(
        &self,
        number: u32,
        gpa: Gpa,
        offset: u64,
        bytes: u64,
        flags: SlotFlags,
    ) -> Result<Change, SlotError> {
        self.slots.set_region(&Region {
            slot: number,
            flags: flags.bits(),
            gpa,
            size: bytes,
            hva: self.host(offset),
        })
    }

    /// Makes the vCPU one of the VM's readers (outside guest mode: nobody waits for it).
    pub fn join(&mut self) -> Arc<Participant> {
        let participant = self.domain.register(Arc::new(NoKick));
        self.vcpu.set_participant(&participant);
        participant
    }

    /// The host address of a byte of RAM.
    pub fn host(&self, offset: u64) -> Hva {
        self.ram.hva().wrapping_add(offset)
    }

    pub fn poke(&self, offset: u64, value: u64) {
        access::store_word(self.host(offset), value).expect("RAM is there");
    }

    pub fn peek(&self, offset: u64) -> u64 {
        access::load_word(self.host(offset)).expect("RAM is there")
    }
}

/// Nobody has to be woken.
pub struct NoKick;

impl Kick for NoKick {
    fn kick(&self, _requests: Requests) {}
}

/// Registers of a mode, with write protection and NX where the mode has it.
pub fn registers(cr4: Cr4, efer: Efer, cr3: u64) -> PagingRegisters {
    PagingRegisters {
        cr0: (Cr0::PE | Cr0::PG | Cr0::WP).bits(),
        cr3,
        cr4: cr4.bits(),
        efer: efer.bits(),
        ..PagingRegisters::default()
    }
}

/// 4-level paging with NX.
pub fn long_mode(cr3: u64) -> PagingRegisters {
    registers(Cr4::PAE | Cr4::PGE, Efer::LME | Efer::LMA | Efer::NXE, cr3)
}

/// Tables at 0x1000 to 0x4000 that map 4 MiB (virtual) to 2 MiB (physical) by a 4 KiB page.
pub fn one_page(machine: &mut Machine) {
    machine.poke(0x1000, 0x2000 | 7);
    machine.poke(0x2000, 0x3000 | 7);
    machine.poke(0x3000 + 2 * 8, 0x4000 | 7);
    machine.poke(0x4000, 0x20_0000 | 7);
    let _ = machine.vcpu.set_registers(&long_mode(0x1000));
}
