//! The guest's x87 pointers.
//!
//! The host's x87 keeps the addresses of translated code and of the host's memory, and a context switch
//! of the host may lose even those. So translated code notes what the guest is to see: the number of a
//! mark, and the data's offset. What they stand for is put together here when somebody looks.

use super::enter;
use super::frame::X87;
use super::segments::segment;
use super::vcpu::Vcpu;
use crate::translate::X87Mark;

const CS: u8 = 1;
const DS: u8 = 3;

impl Vcpu {
    /// The registers of the guest into the image.
    pub(super) fn fpu_out(&mut self) {
        self.settle_x87();
        enter::store_fpu(self.frame_mut());
    }

    /// The image into the registers.
    pub(super) fn fpu_in(&mut self) {
        enter::load_fpu(self.frame_mut());
    }

    /// Replaces the mark by what it stands for: before the selectors change, the marks go, or
    /// somebody looks.
    pub(super) fn settle_x87(&mut self) {
        let X87 { mark, segment, .. } = self.frame().x87;
        if mark == 0 {
            return;
        }
        let Some(&X87Mark { rip, opcode, .. }) = self.tables.x87.get(mark as usize - 1) else {
            return;
        };
        self.settle_selectors(segment);
        let x87 = &mut self.frame_mut().x87;
        x87.mark = 0;
        x87.segment = X87::SEGMENT_KNOWN;
        x87.pointers.ip = rip;
        x87.pointers.opcode = opcode;
    }

    fn settle_selectors(&mut self, data: u8) {
        let data = if self.context.mode.is_64() { DS } else { data };
        let state = self.state();
        let cs = segment(state, CS).selector;
        let ds = (data != X87::SEGMENT_KNOWN).then(|| segment(state, data).selector);
        let pointers = &mut self.frame_mut().x87.pointers;
        pointers.cs = cs;
        pointers.ds = ds.unwrap_or(pointers.ds);
    }

    /// An exception was found by the instruction whose translation holds this offset of the cache: the
    /// one before it may have left its note to it.
    pub(super) fn note_deferred_x87(&mut self, block_start: u32, offset: u32) {
        let before = self.tables.x87.partition_point(|mark| mark.host < offset);
        let Some(last) = before.checked_sub(1) else {
            return;
        };
        // The mark of the instruction that trapped is among them, if it has one.
        let trapped = self.tables.x87[last].end > offset;
        let Some(index) = last.checked_sub(usize::from(trapped)) else {
            return;
        };
        let mark = self.tables.x87[index];
        if mark.deferred && mark.host >= block_start {
            self.frame_mut().x87.mark = index as u32 + 1;
        }
    }
}
