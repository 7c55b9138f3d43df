//! The dirty log of a slot that stands below as several pieces.
//!
//! Each piece logs its own pages. What a piece had logged when a change of attributes took it away is
//! carried with the slot: `KVM_SET_MEMORY_ATTRIBUTES` leaves a slot's log alone. So a page is dirty if
//! its piece says so, or what is carried.
//!
//! Where new logs begin with every page marked (`KVM_DIRTY_LOG_INITIALLY_SET`), those of new pieces do
//! so, too: after a change of attributes more pages may be reported than in kvm.ko, never fewer.

use std::ops::Range;
use std::sync::Arc;

use ::memory::access;
use ::memory::dirty::DirtyBitmap;
use ::memory::slot::{ClearLog, ManualProtect, SlotId, Slots, USER_SLOTS};
use addr::Hva;
use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

use super::{Piece, Protected, State, UserSlot};
use crate::errno::Errno;
use crate::vm::Shared;

const WORD: u64 = 64;

/// A bit for each page of a slot; no words where the slot has no log.
#[derive(Clone, Default)]
pub(super) struct Carried(Vec<u64>);

impl Carried {
    /// The log of a slot with these flags and frames begins.
    pub(super) fn begin(vm: &Shared, flags: u32, frames: &Range<u64>) -> Self {
        if flags & KVM_MEM_LOG_DIRTY_PAGES == 0 {
            return Self::default();
        }
        let pages = frames.end - frames.start;
        let mut words = vec![0; pages.div_ceil(WORD) as usize];
        if vm.slots().manual_protect() == ManualProtect::InitiallySet {
            (0..pages).for_each(|page| set(&mut words, page));
        }
        Self(words)
    }
}

/// The log of a piece that goes away: whose, which of its frames.
pub(super) struct PieceLog {
    slot: u16,
    frames: Range<u64>,
    bitmap: Arc<DirtyBitmap>,
}

impl State {
    /// The logs of these pieces.
    pub(super) fn logs_of(&self, slots: &Slots, gone: &[SlotId]) -> Vec<PieceLog> {
        let of_slot = |(slot, pieces): (&u16, &Vec<Piece>)| {
            let gone = pieces
                .iter()
                .filter(|piece| gone.contains(&SlotId::new(piece.number.into())));
            let logs = gone.filter_map(|piece| {
                let below = slots.get(SlotId::new(piece.number.into()))?;
                Some(PieceLog {
                    slot: *slot,
                    frames: piece.frames.clone(),
                    bitmap: below.dirty?,
                })
            });
            logs.collect::<Vec<_>>()
        };
        self.pieces.of.iter().flat_map(of_slot).collect()
    }

    /// Keeps what these logs hold.
    pub(super) fn carry(&mut self, logs: &[PieceLog]) {
        for log in logs {
            if let Some(slot) = self.slots.get_mut(&log.slot) {
                let mut words = vec![0; log.bitmap.words()];
                log.bitmap.copy_to(&mut words);
                let first = log.frames.start - slot.frames.start;
                add(&mut slot.carried.0, first, &words);
            }
        }
    }

    /// A slot that logs, and its pieces.
    fn logged(&mut self, vm: &Shared, slot: u32) -> Result<(&mut UserSlot, &[Piece]), Errno> {
        if vm.slots().dirty_ring_bytes().is_some() {
            return Err(Errno::ENXIO);
        }
        let number = u16::try_from(slot).map_err(|_| Errno::EINVAL)?;
        if number >= USER_SLOTS {
            return Err(Errno::EINVAL);
        }
        let found = self.slots.get_mut(&number);
        let logged = found.filter(|slot| slot.flags & KVM_MEM_LOG_DIRTY_PAGES != 0);
        let pieces = self.pieces.of.get(&number).map_or(&[][..], Vec::as_slice);
        Ok((logged.ok_or(Errno::ENOENT)?, pieces))
    }
}

impl Protected {
    /// `KVM_GET_DIRTY_LOG`: one bit per page of the slot.
    pub(in crate::vm) fn harvest(&self, vm: &Shared, slot: u32) -> Result<Vec<u64>, Errno> {
        let mut state = self.lock();
        let (slot, pieces) = state.logged(vm, slot)?;
        let mut words = slot.carried.0.clone();
        if vm.slots().manual_protect() == ManualProtect::Off {
            slot.carried.0.fill(0);
        }
        for piece in pieces {
            let of_piece = vm.slots().harvest(piece.number.into());
            let of_piece = of_piece.map_err(|error| Errno(error.errno()))?;
            add(
                &mut words,
                piece.frames.start - slot.frames.start,
                &of_piece,
            );
        }
        Ok(words)
    }

    /// `KVM_CLEAR_DIRTY_LOG`.
    pub(in crate::vm) fn clear(&self, vm: &Shared, asked: &ClearLog) -> Result<(), Errno> {
        let mut state = self.lock();
        let (slot, pieces) = state.logged(vm, asked.slot)?;
        if !asked.first_page.is_multiple_of(WORD)
            || !asked.fits(slot.frames.end - slot.frames.start)
        {
            return Err(Errno::EINVAL);
        }
        let mut words = vec![0; u64::from(asked.num_pages).div_ceil(WORD) as usize];
        access::read_words(asked.bitmap, &mut words).map_err(|_| Errno::EFAULT)?;
        let mut all = vec![0; slot.carried.0.len()];
        let first = (asked.first_page / WORD) as usize;
        for (to, word) in all.iter_mut().skip(first).zip(&words) {
            *to = *word;
        }
        for (carried, word) in slot.carried.0.iter_mut().zip(&all) {
            *carried &= !word;
        }
        for piece in pieces {
            let first = piece.frames.start - slot.frames.start;
            let pages = piece.frames.end - piece.frames.start;
            let words = part(&all, first, pages);
            let of_piece = ClearLog {
                slot: piece.number.into(),
                first_page: 0,
                num_pages: pages as u32,
                bitmap: Hva::new(words.as_ptr() as u64),
            };
            let cleared = vm.slots().clear_dirty_log(&of_piece);
            cleared.map_err(|error| Errno(error.errno()))?;
        }
        Ok(())
    }
}

fn set(words: &mut [u64], page: u64) {
    if let Some(word) = words.get_mut((page / WORD) as usize) {
        *word |= 1 << (page % WORD);
    }
}

/// The pages whose bits are set.
fn pages_of(words: &[u64]) -> impl Iterator<Item = u64> {
    (0_u64..).zip(words).flat_map(|(index, word)| {
        let set = (0..WORD).filter(move |bit| word >> bit & 1 != 0);
        set.map(move |bit| index * WORD + bit)
    })
}

/// Adds a piece's pages, the first of which is the slot's page `first`.
fn add(to: &mut [u64], first: u64, words: &[u64]) {
    pages_of(words).for_each(|page| set(to, first + page));
}

/// The pages from `first` on.
fn part(of: &[u64], first: u64, pages: u64) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(WORD) as usize];
    pages_of(of)
        .filter(|page| (first..first + pages).contains(page))
        .for_each(|page| set(&mut words, page - first));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_move_between_a_slot_and_its_pieces() {
        let piece = [1 << 63 | 1, 0b10];
        let mut slot = vec![0; 3];
        add(&mut slot, 60, &piece);
        assert_eq!(pages_of(&slot).collect::<Vec<_>>(), [60, 123, 125]);
        assert_eq!(part(&slot, 60, 66), piece);
        assert_eq!(part(&slot, 61, 64), [1 << 62,][..]);
    }
}
