//! A running machine, for those who look at it: the control API.

use std::{path::PathBuf, sync::Arc, time::Duration};

use accel::{Kind, Vm};
use addr::{GpaRange, Hva};
use memory::space::{FlatRange, Protection, SlotCall, Space};

use crate::{
    layout,
    machine::Stopper,
    pause::{Gate, Hold, PauseError},
    space::KnownSlots,
};

/// What is known of a machine from its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// What runs it.
    pub accelerator: Kind,
    /// What it boots.
    pub kernel: PathBuf,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
}

/// What a range of guest physical addresses is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Memory.
    Ram,
    /// Memory that the guest can't write.
    Rom,
    /// Registers of devices.
    Mmio,
}

/// A range of guest physical addresses with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub name: String,
    /// Memory, or registers.
    pub kind: RegionKind,
    /// Where it is.
    pub range: GpaRange,
    /// Where it begins in the monitor, if it is memory.
    pub hva: Option<Hva>,
}

/// Looks at a machine from other threads. It keeps the machine's memory alive, not the machine
/// running.
#[derive(Clone)]
pub struct Remote {
    facts: Facts,
    gate: Arc<Gate>,
    stopper: Stopper,
    // Dropped before the memory that it uses.
    vm: Arc<dyn Vm>,
    slots: KnownSlots,
    /// The view that the slots were made from; it keeps the memory in it mapped.
    space: Arc<Space>,
}

impl Remote {
    pub(crate) fn new(
        facts: Facts,
        gate: Arc<Gate>,
        stopper: Stopper,
        vm: Arc<dyn Vm>,
        slots: KnownSlots,
        space: Arc<Space>,
    ) -> Self {
        Self {
            facts,
            gate,
            stopper,
            vm,
            slots,
            space,
        }
    }

    /// What is known of it from its configuration.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Stops all vCPUs between two instructions, for as long as the answer lives.
    pub fn hold(&self, patience: Duration) -> Result<Hold, PauseError> {
        self.gate.hold(patience)
    }

    /// Ends the machine.
    pub fn stop(&self) {
        self.stopper.stop();
    }

    /// The VM in its accelerator.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// The memory slots that the monitor registered, by guest address.
    pub fn slots(&self) -> Vec<SlotCall> {
        self.slots.get()
    }

    /// What lies where in guest physical memory, in ascending order.
    pub fn regions(&self) -> Vec<Region> {
        let view = self.space.view();
        let mut regions: Vec<_> = view.ranges().iter().map(region).collect();
        regions.extend(in_accelerator());
        regions.sort_by_key(|region| region.range.start());
        regions
    }
}

fn region(flat: &FlatRange) -> Region {
    Region {
        name: flat.name.to_string(),
        kind: match (flat.is_ram(), flat.protection()) {
            (false, _) => RegionKind::Mmio,
            (true, Protection::ReadOnly) => RegionKind::Rom,
            (true, Protection::ReadWrite) => RegionKind::Ram,
        },
        range: flat.range,
        hva: flat.hva(),
    }
}

/// Devices that the accelerator emulates: no region of ours shows them.
fn in_accelerator() -> impl Iterator<Item = Region> {
    const PAGE: u64 = 0x1000;
    let devices = [
        ("ioapic", layout::IOAPIC, PAGE),
        ("local apic, msi", layout::LOCAL_APIC, 0x10_0000),
    ];
    devices.into_iter().filter_map(|(name, gpa, bytes)| {
        Some(Region {
            name: name.to_owned(),
            kind: RegionKind::Mmio,
            range: GpaRange::new(gpa, bytes)?,
            hva: None,
        })
    })
}
