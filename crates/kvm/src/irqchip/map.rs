//! The map from addresses to local APICs, for as long as they are unambiguous.
//!
//! Physical IDs index an array. Logical IDs need all APICs to agree on one model:
//!
//! | model         | where a logical address leads                                   |
//! |---------------|-----------------------------------------------------------------|
//! | none enabled  | nowhere                                                         |
//! | flat          | one APIC a bit                                                  |
//! | cluster       | 16 clusters of four                                             |
//! | x2APIC        | the logical ID is derived from the ID: the physical array again |
//! | mixed         | unknown: ask everyone                                           |

use std::sync::Arc;

use super::apic::Lapic;
use super::apic::registers::{DFR_FLAT, reg};
use super::message::{DestinationMode, Message};

type Slot = Option<Arc<Lapic>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Logical {
    NoneEnabled,
    Flat,
    Cluster,
    X2apic,
    Mixed,
}

/// A snapshot of all addresses.
pub(super) struct Map {
    physical: Vec<Slot>,
    logical: Logical,
    /// Flat: the first eight. Cluster: four a cluster.
    groups: [Slot; 64],
}

impl Map {
    /// `None` where two APICs have the same physical address.
    pub(super) fn build(apics: &[Arc<Lapic>], wide_ids: bool) -> Option<Map> {
        let present = || apics.iter().filter(|lapic| lapic.is_hardware_enabled());
        let highest = present()
            .map(|lapic| lapic.id())
            .max()
            .unwrap_or(0)
            .max(255);
        let mut map = Map {
            physical: vec![None; highest as usize + 1],
            logical: Logical::NoneEnabled,
            groups: [const { None }; 64],
        };
        for lapic in present() {
            map.add_physical(lapic, wide_ids)?;
            map.add_logical(lapic);
        }
        Some(map)
    }

    fn add_physical(&mut self, lapic: &Arc<Lapic>, wide_ids: bool) -> Option<()> {
        let (wide, narrow) = (lapic.id() as usize, lapic.xapic_id() as usize);
        let x2apic = lapic.is_x2apic();
        if wide_ids {
            // The monitor knows IDs of 32 bits: they are unique, and an aliased ID of 8 bits
            // belongs to whoever came first.
            if x2apic || wide > 0xff {
                self.physical[wide] = Some(Arc::clone(lapic));
            }
            if !x2apic && self.physical[narrow].is_none() {
                self.physical[narrow] = Some(Arc::clone(lapic));
            }
            return Some(());
        }
        let slot = self.physical.get_mut(if x2apic { wide } else { narrow })?;
        if slot.is_some() {
            return None;
        }
        *slot = Some(Arc::clone(lapic));
        Some(())
    }

    fn add_logical(&mut self, lapic: &Arc<Lapic>) {
        let ldr = lapic.register(reg::LDR);
        if self.logical == Logical::Mixed || !lapic.is_software_enabled() || ldr == 0 {
            return;
        }
        let model = match (lapic.is_x2apic(), lapic.register(reg::DFR)) {
            (true, _) => Logical::X2apic,
            (false, DFR_FLAT) => Logical::Flat,
            (false, _) => Logical::Cluster,
        };
        if self.logical == Logical::NoneEnabled {
            self.logical = model;
        }
        if self.logical != model {
            self.logical = Logical::Mixed;
        } else if model != Logical::X2apic {
            self.add_to_group(lapic, ldr >> 24);
        }
    }

    fn add_to_group(&mut self, lapic: &Arc<Lapic>, id: u32) {
        let (first, mask) = self.group(id);
        if mask == 0 {
            return;
        }
        let slot = &mut self.groups[first + mask.trailing_zeros() as usize];
        if mask.is_power_of_two() && slot.is_none() {
            *slot = Some(Arc::clone(lapic));
        } else {
            self.logical = Logical::Mixed;
        }
    }

    /// The group that a logical address names, and the members in it.
    fn group(&self, address: u32) -> (usize, u32) {
        match self.logical {
            Logical::Flat => (0, address & 0xff),
            Logical::Cluster => (4 * ((address >> 4) & 0xf) as usize, address & 0xf),
            _ => (0, 0),
        }
    }

    /// Whether all enabled APICs are in x2APIC mode.
    pub(super) fn is_x2apic(&self) -> bool {
        self.logical == Logical::X2apic
    }

    /// The APIC at a physical address.
    pub(super) fn physical(&self, id: u32) -> Option<&Arc<Lapic>> {
        self.physical.get(id as usize)?.as_ref()
    }

    /// The targets of a message that is no broadcast; `None` where the map can't tell.
    pub(super) fn targets(&self, message: &Message) -> Option<Targets<'_>> {
        let (slots, mask) = match message.mode {
            DestinationMode::Physical => {
                let at = message.destination as usize;
                (self.physical.get(at..=at).unwrap_or(&[]), 1)
            }
            DestinationMode::Logical => self.logical_slots(message.destination)?,
        };
        let mask = mask & low_bits(slots.len());
        if message.mode == DestinationMode::Logical && message.is_lowest_priority() && mask != 0 {
            let nth = u32::from(message.vector) % mask.count_ones();
            return Some(Targets {
                slots,
                mask: nth_set_bit(mask, nth),
            });
        }
        Some(Targets { slots, mask })
    }

    fn logical_slots(&self, address: u32) -> Option<(&[Slot], u32)> {
        match self.logical {
            Logical::Mixed => None,
            Logical::X2apic => {
                let first = (address >> 16) as usize * 16;
                let last = self.physical.len().min(first + 16);
                Some((
                    self.physical.get(first..last).unwrap_or(&[]),
                    address & 0xffff,
                ))
            }
            _ => {
                let (first, mask) = self.group(address);
                Some((&self.groups[first..first + 8.min(64 - first)], mask))
            }
        }
    }
}

fn low_bits(count: usize) -> u32 {
    if count >= 32 {
        u32::MAX
    } else {
        (1 << count) - 1
    }
}

fn nth_set_bit(mut mask: u32, nth: u32) -> u32 {
    for _ in 0..nth {
        mask &= mask - 1;
    }
    mask & mask.wrapping_neg()
}

/// The APICs that a message goes to.
pub(super) struct Targets<'a> {
    slots: &'a [Slot],
    mask: u32,
}

impl<'a> Iterator for Targets<'a> {
    type Item = &'a Arc<Lapic>;

    fn next(&mut self) -> Option<&'a Arc<Lapic>> {
        while self.mask != 0 {
            let at = self.mask.trailing_zeros() as usize;
            self.mask &= self.mask - 1;
            if let Some(lapic) = &self.slots[at] {
                return Some(lapic);
            }
        }
        None
    }
}
