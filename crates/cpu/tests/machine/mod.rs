//! A machine around one vCPU: RAM from guest physical address 0, and a platform that records.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unreachable_pub, reason = "shared by test files")]

use std::sync::Arc;

use addr::{Address, Gpa, Hva};
use cpu::system::{Instructions, Offer, Vendor};
use cpu::{CodeMap, CpuState, CpuidResult, Exit, Platform, Refusal, Segment, Vcpu, VcpuConfig};
use memory::access;
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig};
use mmu::{Mmu, MmuConfig, VcpuMmu};

pub const RAM_BYTES: u64 = 16 << 20;
/// Where tests put code: identity-mapped.
pub const CODE: u64 = 0x10_0000;
/// Where tests put data.
pub const DATA: u64 = 0x20_0000;
/// Where stacks end.
pub const STACK: u64 = 0x30_0000;
const PML4: u64 = 0x1000;

/// Nothing but RAM below the monitor.
#[derive(Debug, Default)]
pub struct Bare {
    pub task_priority: u8,
}

impl Platform for Bare {
    fn cpuid(&mut self, _: &CpuState, leaf: u32, _: u32) -> CpuidResult {
        CpuidResult {
            eax: leaf,
            ..CpuidResult::default()
        }
    }
    fn read_msr(&mut self, _: &CpuState, _: u32) -> Result<u64, Refusal> {
        Ok(0)
    }
    fn write_msr(&mut self, _: &mut CpuState, _: u32, _: u64) -> Result<(), Refusal> {
        Ok(())
    }
    fn task_priority(&self) -> u8 {
        self.task_priority
    }
    fn set_task_priority(&mut self, priority: u8) {
        self.task_priority = priority;
    }
    fn hypercall(&mut self, _: &mut CpuState) -> Result<u64, Refusal> {
        Ok(0)
    }
}

pub struct Machine {
    pub ram: GuestRam,
    pub domain: Arc<Domain>,
    pub slots: Arc<Slots>,
    pub mmu: Arc<Mmu>,
    pub code: Arc<CodeMap>,
    pub vcpu: Vcpu,
    pub platform: Bare,
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes,
        unusable: false,
    }
}

/// Registers of 64-bit kernel code with the first GiB mapped one to one.
pub fn long_mode(state: &mut CpuState) {
    state.rip = CODE;
    state.gpr[4] = STACK;
    state.rflags = 2;
    state.cr0 = 0x8005_0033;
    state.cr3 = PML4;
    state.cr4 = 0x4_06b0;
    state.xcr0 = 7;
    state.msrs.efer = 0xd01;
    state.segments.cs = segment(0x10, 0xa09b);
    let data = segment(0x18, 0xc093);
    let s = &mut state.segments;
    (s.ds, s.es, s.ss, s.fs, s.gs) = (data, data, data, data, data);
    s.ldtr.unusable = true;
    s.tr = segment(0, 0x8b);
}

/// Registers of flat 32-bit code without paging.
pub fn protected_mode(state: &mut CpuState) {
    long_mode(state);
    state.cr0 = 0x33;
    state.msrs.efer = 0;
    state.segments.cs = segment(8, 0xc09b);
}

impl Machine {
    /// RAM with page tables that map the first GiB with large pages, and `code` at [`CODE`].
    pub fn new(code: &[u8]) -> Self {
        Self::with_mmu(code, MmuConfig::default())
    }

    /// The same, with this MMU.
    pub fn with_mmu(code: &[u8], config: MmuConfig) -> Self {
        let ram = GuestRam::new(&RamConfig::new(RAM_BYTES)).expect("RAM");
        let domain = Domain::new();
        let slots = Slots::new(Arc::clone(&domain), SlotsConfig::default());
        let mmu = Mmu::new(&slots, config);
        slots
            .set_region(&Region {
                slot: 0,
                flags: 0,
                gpa: Gpa::new(0),
                size: RAM_BYTES,
                hva: ram.hva(),
            })
            .expect("a slot for all RAM");
        let map = Arc::new(CodeMap::default());
        let vcpu = Self::vcpu(&mmu, &domain, &map, 0);
        let mut machine = Self {
            ram,
            domain,
            slots,
            mmu,
            code: map,
            vcpu,
            platform: Bare::default(),
        };
        machine.page_tables();
        machine.write(CODE, code);
        long_mode(machine.vcpu.state_mut());
        machine
    }

    /// Another vCPU of the same VM.
    pub fn vcpu(mmu: &Arc<Mmu>, domain: &Arc<Domain>, code: &Arc<CodeMap>, id: u32) -> Vcpu {
        let config = VcpuConfig {
            code: Arc::clone(code),
            cache_size: 16 << 20,
            blocks: cpu::BlockLength::Whole,
            offer: Offer {
                cr4: u64::MAX,
                efer: 0xd01,
                xcr0: 7,
                physical_bits: 46,
                instructions: Instructions::all(),
                x87: cpu::fpu::PointerRules::empty(),
                // As KVM's own emulator does it, which is what these tests are compared with.
                vendor: Vendor::Intel,
            },
        };
        Vcpu::new(config, VcpuMmu::new(mmu, id), domain).expect("a vCPU")
    }

    fn page_tables(&mut self) {
        self.write_word(PML4, 0x2007);
        self.write_word(0x2000, 0x3007);
        for i in 0..512 {
            self.write_word(0x3000 + 8 * i, i << 21 | 0x87);
        }
    }

    pub fn host(&self, offset: u64) -> Hva {
        self.ram.hva().wrapping_add(offset)
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        access::write(self.host(at), bytes).expect("RAM is there");
    }

    pub fn read(&self, at: u64, bytes: &mut [u8]) {
        access::read(self.host(at), bytes).expect("RAM is there");
    }

    pub fn write_word(&self, at: u64, value: u64) {
        access::store_word(self.host(at), value).expect("RAM is there");
    }

    pub fn word(&self, at: u64) -> u64 {
        access::load_word(self.host(at)).expect("RAM is there")
    }

    pub fn run(&mut self) -> Exit {
        self.vcpu.run(&mut self.platform)
    }

    /// Runs to the end of the code, which is a `HLT`.
    pub fn run_to_halt(&mut self) -> &CpuState {
        assert_eq!(self.run(), Exit::Halt, "{:#x?}", self.vcpu.state().rip);
        self.vcpu.state()
    }
}
