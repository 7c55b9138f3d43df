//! Guest physical memory by the memslots alone, to be read and not written: probes, PDPTEs.

use addr::{Address, Gpa};
use memory::access as host;
use memory::slot::Table;
use x86::paging::{PDPTE_RESERVED_LOW, Pte};

use crate::access::HostFault;
use crate::registers::PagingFeatures;
use crate::walker::{GuestPhysical, PteFault, PteUpdate, PteWidth};

/// The memory that a table of slots names.
pub(crate) struct SlotTables<'a> {
    table: &'a Table,
}

impl<'a> SlotTables<'a> {
    pub(crate) fn new(table: &'a Table) -> Self {
        Self { table }
    }
}

impl GuestPhysical for SlotTables<'_> {
    fn read_pte(&mut self, gpa: Gpa, width: PteWidth) -> Result<u64, PteFault> {
        let hva = self
            .table
            .find(gpa.frame())
            .and_then(|slot| slot.hva_at(gpa))
            .ok_or(PteFault::NotMemory)?;
        match width {
            PteWidth::Four => host::load_word::<u32>(hva).map(u64::from),
            PteWidth::Eight => host::load_word::<u64>(hva),
        }
        .map_err(|fault| {
            PteFault::Host(HostFault {
                gpa,
                hva: fault.hva,
            })
        })
    }

    fn cmpxchg_pte(
        &mut self,
        _gpa: Gpa,
        _width: PteWidth,
        _current: u64,
        _new: u64,
    ) -> Result<PteUpdate, PteFault> {
        Ok(PteUpdate::ReadOnly)
    }
}

/// The four PDPTEs at `gpa`, or `None` where `MOV CR3` faults.
pub(crate) fn load_pdptrs(
    memory: &mut impl GuestPhysical,
    gpa: Gpa,
    features: PagingFeatures,
) -> Option<[u64; 4]> {
    let high = !0 << features.physical_bits();
    let mut pdptrs = [0; 4];
    for (index, pdpte) in pdptrs.iter_mut().enumerate() {
        let at = gpa.wrapping_add(index as u64 * 8);
        *pdpte = memory.read_pte(at, PteWidth::Eight).ok()?;
        let present = *pdpte & Pte::P.bits() != 0;
        if present && *pdpte & (high | PDPTE_RESERVED_LOW) != 0 {
            return None;
        }
    }
    Some(pdptrs)
}
