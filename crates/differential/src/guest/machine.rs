//! One vCPU with RAM at guest physical address 0, and nothing around it.

use std::sync::Arc;

use addr::{Address, Gpa, Hva};
use anyhow::{Context, Result, anyhow};
use cpu::system::Offer;
use cpu::{Exit, Vcpu, VcpuConfig};
use memory::quiesce::Domain;
use memory::ram::{GuestRam, RamConfig};
use memory::slot::{Region, Slots, SlotsConfig};
use mmu::{Mmu, MmuConfig, VcpuMmu};
use vm_memory::VolatileMemory;

use super::quiet::{Quiet, host_cpuid};
use super::watchdog::Watchdog;

/// Bytes of translated code before the cache is emptied.
const CACHE_BYTES: usize = 16 << 20;

/// A guest of one vCPU.
pub struct Machine {
    /// The vCPU, first: it is dropped before its memory.
    pub vcpu: Vcpu,
    ram: GuestRam,
    /// Bytes of RAM on either side that are in no memslot.
    margin: u64,
    _slots: Arc<Slots>,
    quiet: Quiet,
}

impl Machine {
    /// A machine with so much RAM, a vCPU in power-up state.
    pub fn new(ram_bytes: u64) -> Result<Self> {
        Self::with_margin(ram_bytes, 0)
    }

    /// The same, with so many bytes before and behind the memslot that are the monitor's alone.
    pub fn with_margin(ram_bytes: u64, margin: u64) -> Result<Self> {
        let ram = GuestRam::new(&RamConfig::new(ram_bytes + 2 * margin))?;
        let domain = Domain::new();
        let slots = Slots::new(Arc::clone(&domain), SlotsConfig::default());
        slots
            .set_region(&Region {
                slot: 0,
                flags: 0,
                gpa: Gpa::new(0),
                size: ram_bytes,
                hva: ram.hva().wrapping_add(margin),
            })
            .map_err(|error| anyhow!("memslot: {error:?}"))?;
        let mmu = Mmu::new(&slots, MmuConfig::default());
        let config = VcpuConfig {
            code: Arc::default(),
            cache_size: CACHE_BYTES,
            blocks: cpu::BlockLength::Whole,
            offer: Offer::from_cpuid(host_cpuid),
        };
        let vcpu = Vcpu::new(config, VcpuMmu::new(&mmu, 0), &domain).context("a vCPU")?;
        Ok(Self {
            vcpu,
            ram,
            margin,
            _slots: slots,
            quiet: Quiet,
        })
    }

    /// Where RAM lies in this process.
    pub fn hva(&self) -> Hva {
        self.ram.hva().wrapping_add(self.margin)
    }

    /// Fills what is in no memslot.
    pub fn fill_margins(&self, byte: u8) {
        let bytes = vec![byte; self.margin as usize];
        for start in self.margins() {
            let slice = self.ram.mapping().get_slice(start, bytes.len());
            slice.expect("inside the mapping").copy_from(&bytes);
        }
    }

    /// Whether what is in no memslot still holds this byte everywhere.
    pub fn margins_hold(&self, byte: u8) -> bool {
        let mut bytes = vec![0; self.margin as usize];
        self.margins().into_iter().all(|start| {
            let slice = self.ram.mapping().get_slice(start, bytes.len());
            slice.expect("inside the mapping").copy_to(&mut bytes);
            bytes.iter().all(|found| *found == byte)
        })
    }

    fn margins(&self) -> [usize; 2] {
        [0, (self.ram.size() - self.margin) as usize]
    }

    /// Writes RAM as the monitor does, behind the vCPU's back.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) {
        let slice = self
            .ram
            .mapping()
            .get_slice((self.margin + gpa.raw()) as usize, bytes.len());
        slice.expect("inside RAM").copy_from(bytes);
    }

    /// Reads RAM.
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) {
        let slice = self
            .ram
            .mapping()
            .get_slice((self.margin + gpa.raw()) as usize, bytes.len());
        slice.expect("inside RAM").copy_to(bytes);
    }

    /// Runs until the vCPU leaves.
    pub fn run(&mut self) -> Exit {
        self.vcpu.run(&mut self.quiet)
    }

    /// A thread that kicks the vCPU when one run takes `ticks` looks of the watchdog.
    pub fn watchdog(&self, ticks: u32) -> Watchdog {
        Watchdog::new(self.vcpu.kicker(), ticks)
    }
}
