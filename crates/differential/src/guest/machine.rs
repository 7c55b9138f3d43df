//! One vCPU with RAM at guest physical address 0, and nothing around it.

use std::sync::Arc;

use addr::{Gpa, Hva};
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
    _slots: Arc<Slots>,
    quiet: Quiet,
}

impl Machine {
    /// A machine with so much RAM, a vCPU in power-up state.
    pub fn new(ram_bytes: u64) -> Result<Self> {
        let ram = GuestRam::new(&RamConfig::new(ram_bytes))?;
        let domain = Domain::new();
        let slots = Slots::new(Arc::clone(&domain), SlotsConfig::default());
        slots
            .set_region(&Region {
                slot: 0,
                flags: 0,
                gpa: Gpa::new(0),
                size: ram_bytes,
                hva: ram.hva(),
            })
            .map_err(|error| anyhow!("memslot: {error:?}"))?;
        let mmu = Mmu::new(&slots, MmuConfig::default());
        let config = VcpuConfig {
            code: Arc::default(),
            cache_size: CACHE_BYTES,
            offer: Offer::from_cpuid(host_cpuid),
        };
        let vcpu = Vcpu::new(config, VcpuMmu::new(&mmu, 0), &domain).context("a vCPU")?;
        Ok(Self {
            vcpu,
            ram,
            _slots: slots,
            quiet: Quiet,
        })
    }

    /// Where RAM lies in this process.
    pub fn hva(&self) -> Hva {
        self.ram.hva()
    }

    /// Writes RAM as the monitor does, behind the vCPU's back.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) {
        let slice = self
            .ram
            .mapping()
            .get_slice(gpa.raw() as usize, bytes.len());
        slice.expect("inside RAM").copy_from(bytes);
    }

    /// Reads RAM.
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) {
        let slice = self
            .ram
            .mapping()
            .get_slice(gpa.raw() as usize, bytes.len());
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
