//! Guest physical memory, from wherever the question is asked: inside the monitor, or from another
//! process.

use addr::{Address, Gpa, Hva};
use memory::access;
use memory::slot::{Slot, Table};
use mmu::HostFault;
use mmu::walker::{GuestPhysical, PteFault, PteUpdate, PteWidth};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex;

/// A memory slot: a range of guest physical memory, and where it lies in the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SlotRange {
    /// Its number.
    pub slot: u32,
    /// Its address space: 1 is that of system management mode.
    pub address_space: u32,
    /// Its first guest physical address.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub gpa: Gpa,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where it begins in the monitor.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub hva: Hva,
    /// The guest may write.
    pub writable: bool,
    /// Writes are logged.
    pub logs_dirty: bool,
    /// What the monitor calls it, where it tells.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
}

impl SlotRange {
    /// As an accelerator of ours holds it.
    pub fn of_slot(slot: &Slot) -> Self {
        let range = slot.range();
        Self {
            slot: slot.id.number().into(),
            address_space: slot.id.address_space() as u32,
            gpa: range.start(),
            bytes: range.len(),
            hva: slot.hva,
            writable: slot.is_writable(),
            logs_dirty: slot.logs_dirty(),
            name: None,
        }
    }

    /// All slots of a table.
    pub fn of_table(table: &Table) -> Vec<Self> {
        table.iter().map(Self::of_slot).collect()
    }

    /// How far into it an address is.
    pub fn offset_of(&self, gpa: Gpa) -> Option<u64> {
        gpa.offset_from(self.gpa)
            .filter(|offset| *offset < self.bytes)
    }

    /// How far into it a host address is.
    pub fn offset_of_hva(&self, hva: Hva) -> Option<u64> {
        hva.offset_from(self.hva)
            .filter(|offset| *offset < self.bytes)
    }
}

/// Bytes of the monitor's memory.
pub trait HostBytes {
    /// Reads them all, or says where it can't.
    fn read(&self, hva: Hva, into: &mut [u8]) -> Result<(), Hva>;
}

/// This process.
#[derive(Clone, Copy, Debug, Default)]
pub struct OwnBytes;

impl HostBytes for OwnBytes {
    fn read(&self, hva: Hva, into: &mut [u8]) -> Result<(), Hva> {
        // Entries of page tables are read in one load, because the guest changes them meanwhile.
        let word =
            match into.len() {
                8 => access::load_word::<u64>(hva)
                    .map(|word| into.copy_from_slice(&word.to_le_bytes())),
                4 => access::load_word::<u32>(hva)
                    .map(|word| into.copy_from_slice(&word.to_le_bytes())),
                _ => access::read(hva, into),
            };
        word.map_err(|fault| fault.hva)
    }
}

/// Guest physical memory: slots, and the bytes behind them.
pub struct GuestView<'a> {
    /// The slots, in any order.
    pub slots: &'a [SlotRange],
    /// The bytes.
    pub bytes: &'a dyn HostBytes,
}

impl GuestView<'_> {
    /// The slot at an address, of the address space that is not system management mode's.
    pub fn slot(&self, gpa: Gpa) -> Option<(&SlotRange, u64)> {
        let mut slots = self.slots.iter().filter(|slot| slot.address_space == 0);
        slots.find_map(|slot| Some((slot, slot.offset_of(gpa)?)))
    }

    /// Where an address lies in the monitor.
    pub fn hva(&self, gpa: Gpa) -> Option<Hva> {
        let (slot, offset) = self.slot(gpa)?;
        slot.hva.checked_add(offset)
    }

    /// Reads bytes that lie in one slot.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), PteFault> {
        let hva = self.hva(gpa).ok_or(PteFault::NotMemory)?;
        let read = self.bytes.read(hva, into);
        read.map_err(|hva| PteFault::Host(HostFault { gpa, hva }))
    }

    /// The four PDPTEs that a `MOV` to CR3 would load now (SDM 3A, 5.4.1).
    pub fn pdptrs(&self, cr3: u64) -> Option<[u64; 4]> {
        let mut bytes = [0; 32];
        self.read(Gpa::new(cr3 & 0xffff_ffe0), &mut bytes).ok()?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut pdptrs = [0; 4];
        for (pdpte, word) in pdptrs.iter_mut().zip(words) {
            *pdpte = u64::from_le_bytes(*word);
        }
        Some(pdptrs)
    }
}

impl GuestPhysical for GuestView<'_> {
    fn read_pte(&mut self, gpa: Gpa, width: PteWidth) -> Result<u64, PteFault> {
        match width {
            PteWidth::Four => {
                let mut bytes = [0; 4];
                self.read(gpa, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes).into())
            }
            PteWidth::Eight => {
                let mut bytes = [0; 8];
                self.read(gpa, &mut bytes)?;
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    fn cmpxchg_pte(&mut self, _: Gpa, _: PteWidth, _: u64, _: u64) -> Result<PteUpdate, PteFault> {
        // Whoever explains changes nothing.
        Ok(PteUpdate::ReadOnly)
    }
}
