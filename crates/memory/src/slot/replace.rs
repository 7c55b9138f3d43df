//! Several slots changed at once.

use std::sync::Arc;

use addr::PageSize;

use super::frames::FrameSet;
use super::region::{Change, Region, SlotError, Slots, prepare};
use super::{OutOfMemory, Slot, SlotId};

impl Slots {
    /// Takes slots of address space 0 away, adds others, and says which frames are private: no vCPU
    /// sees a state in between. An error changes nothing.
    pub fn replace(
        &self,
        gone: &[SlotId],
        new: &[Region],
        private: FrameSet,
    ) -> Result<(), SlotError> {
        new.iter().try_for_each(|region| self.check(region))?;
        let mut writer = self.lock();
        let mut table = self.snapshot(0).with_generation(writer.next_generation());
        let mut changes = Vec::new();
        for id in gone {
            let slot = id.raw();
            let old = self.slot_of(&writer, *id);
            let old = old.ok_or(SlotError::NothingToDelete { slot })?;
            table.remove(old.base_gfn);
            changes.push(Change::Deleted { old });
        }
        for region in new {
            let Some(slot) = Slot::from_region(region) else {
                continue;
            };
            if let Some(with) = table.overlapping(slot.base_gfn, slot.end_gfn()).next() {
                return Err(SlotError::Overlap {
                    slot: region.slot,
                    with: with.id,
                });
            }
            let frames = 1 << (self.config().physical_bits - PageSize::Size4K.shift());
            if slot.end_gfn().number() > frames {
                return Err(SlotError::GuestRange {
                    slot: region.slot,
                    gpa: region.gpa,
                    size: region.size,
                });
            }
            let slot = self.with_log(&writer, slot, None)?;
            table.insert(slot.clone());
            changes.push(Change::Created { new: slot });
        }
        table.set_private(Arc::new(private));
        for change in &changes {
            let slot = change.old().or(change.new_slot()).map_or(0, |s| s.id.raw());
            prepare(&writer, change).map_err(|OutOfMemory| SlotError::OutOfMemory { slot })?;
        }
        self.publish(&mut writer, 0, table, &changes);
        Ok(())
    }
}
