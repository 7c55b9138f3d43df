//! `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG` and the two ways to use them.
//!
//! | `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` | get                         | clear                        |
//! |-------------------------------------|-----------------------------|------------------------------|
//! | off                                 | reports, clears and protects| clears and protects          |
//! | on                                  | reports                     | clears and protects          |
//! | on, initially set                   | the same; a new bitmap is all ones, and nothing is protected before its first clear |||

use std::sync::atomic::Ordering;

use addr::Hva;

use super::{Slot, SlotId, Slots};
use crate::access::{self, HostFault};
use crate::dirty::{DirtyRing, DirtyWord, RingError};

/// How the monitor harvests (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ManualProtect {
    /// Reading the log clears it.
    #[default]
    Off = 0,
    /// Reading leaves it; the monitor clears piece by piece.
    Enabled = 1,
    /// The same, and a new log says that every page is dirty.
    InitiallySet = 2,
}

impl ManualProtect {
    /// From the argument of `KVM_ENABLE_CAP`; `None` where the kernel says `EINVAL`.
    pub fn from_argument(argument: u64) -> Option<Self> {
        match argument {
            0 => Some(Self::Off),
            1 => Some(Self::Enabled),
            3 => Some(Self::InitiallySet),
            _ => None,
        }
    }
}

/// `struct kvm_clear_dirty_log`, not yet checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClearLog {
    /// Address space in the high half, number in the low.
    pub slot: u32,
    /// A multiple of 64.
    pub first_page: u64,
    /// A multiple of 64, unless it reaches to the slot's end.
    pub num_pages: u32,
    /// One bit per page, from `first_page` on.
    pub bitmap: Hva,
}

/// Why a call on the dirty log is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirtyLogError {
    /// The machine uses rings.
    #[error("the machine has dirty rings, not bitmaps")]
    Rings,
    /// No such slot number or address space, or a range that is not the slot's.
    #[error("slot {slot:#x} has no pages {first_page:#x}+{num_pages:#x} to clear, or can't exist")]
    Range {
        /// The slot's number.
        slot: u32,
        /// The first page.
        first_page: u64,
        /// How many.
        num_pages: u32,
    },
    /// The slot does not exist or does not log.
    #[error("slot {slot:#x} has no dirty log")]
    NoLog {
        /// The slot's number.
        slot: u32,
    },
    /// The monitor's buffer can't be reached.
    #[error("the buffer of a dirty log")]
    Buffer(#[from] HostFault),
}

impl DirtyLogError {
    /// What the kernel answers.
    pub fn errno(self) -> i32 {
        match self {
            Self::Rings => libc::ENXIO,
            Self::Range { .. } => libc::EINVAL,
            Self::NoLog { .. } => libc::ENOENT,
            Self::Buffer(_) => libc::EFAULT,
        }
    }
}

impl Slots {
    /// Chooses how the log is harvested; slots that log already keep their bitmaps.
    pub fn set_manual_protect(&self, mode: ManualProtect) {
        let _writer = self.lock();
        self.manual_protect.store(mode as u8, Ordering::Relaxed);
    }

    /// How the log is harvested. Listeners may ask, too.
    pub fn manual_protect(&self) -> ManualProtect {
        match self.manual_protect.load(Ordering::Relaxed) {
            0 => ManualProtect::Off,
            1 => ManualProtect::Enabled,
            _ => ManualProtect::InitiallySet,
        }
    }

    /// Uses rings of this many bytes instead of bitmaps, from now on and for good.
    pub fn enable_dirty_ring(&self, bytes: u64) -> Result<(), RingError> {
        DirtyRing::entries_for(bytes)?;
        let mut writer = self.lock();
        match writer.ring_bytes {
            None => writer.ring_bytes = Some(bytes),
            // Once only.
            Some(_) => return Err(RingError::Size(bytes)),
        }
        Ok(())
    }

    /// The size of each vCPU's ring in bytes, where rings are used.
    pub fn dirty_ring_bytes(&self) -> Option<u64> {
        self.lock().ring_bytes
    }

    /// `KVM_GET_DIRTY_LOG` into the monitor's memory.
    ///
    /// As in the kernel, a bad buffer is noticed last: what was reported is lost.
    pub fn get_dirty_log(&self, slot: u32, into: Hva) -> Result<(), DirtyLogError> {
        let words = self.harvest(slot)?;
        Ok(access::write_words(into, &words)?)
    }

    /// The dirty log of a slot, one bit per page. Without manual protection it is taken: the log is
    /// clean afterwards, and the next write to each reported page will be noticed.
    pub fn harvest(&self, slot: u32) -> Result<Vec<u64>, DirtyLogError> {
        let writer = self.lock();
        if writer.ring_bytes.is_some() {
            return Err(DirtyLogError::Rings);
        }
        let slot = self.logged_slot(&writer, slot)?;
        let bitmap = slot
            .dirty
            .as_ref()
            .expect("logged_slot returns slots with a log");
        let mut words = vec![0; bitmap.words()];
        if self.manual_protect() != ManualProtect::Off {
            bitmap.copy_to(&mut words);
            return Ok(words);
        }
        let taken = bitmap.take();
        for word in &taken {
            words[word.index] = word.mask;
        }
        self.protect(&writer, &slot, &taken);
        Ok(words)
    }

    /// `KVM_CLEAR_DIRTY_LOG`.
    pub fn clear_dirty_log(&self, clear: &ClearLog) -> Result<(), DirtyLogError> {
        let writer = self.lock();
        if writer.ring_bytes.is_some() {
            return Err(DirtyLogError::Rings);
        }
        let ClearLog {
            slot,
            first_page,
            num_pages,
            bitmap,
        } = *clear;
        let out_of_range = DirtyLogError::Range {
            slot,
            first_page,
            num_pages,
        };
        if !self.has_slot_number(SlotId::new(slot)) || first_page % 64 != 0 {
            return Err(out_of_range);
        }
        let slot = self.logged_slot(&writer, slot)?;
        if !clear.fits(slot.npages) {
            return Err(out_of_range);
        }
        let mut words = vec![0; num_pages.div_ceil(64) as usize];
        access::read_words(bitmap, &mut words)?;
        let cleared = clear_words(&slot, first_page, &words);
        self.protect(&writer, &slot, &cleared);
        Ok(())
    }

    fn logged_slot(
        &self,
        writer: &super::region::Writer,
        slot: u32,
    ) -> Result<Slot, DirtyLogError> {
        let id = SlotId::new(slot);
        if !self.has_slot_number(id) {
            return Err(DirtyLogError::Range {
                slot,
                first_page: 0,
                num_pages: 0,
            });
        }
        self.slot_of(writer, id)
            .filter(|s| s.dirty.is_some())
            .ok_or(DirtyLogError::NoLog { slot })
    }

    /// Has the next write to each page noticed.
    fn protect(&self, writer: &super::region::Writer, slot: &Slot, words: &[DirtyWord]) {
        if !words.is_empty() {
            writer.for_each_listener(|l| l.write_protect(slot, words));
            self.flush();
        }
    }
}

impl ClearLog {
    /// Whether a slot of so many pages has these.
    pub fn fits(&self, npages: u64) -> bool {
        let pages = u64::from(self.num_pages);
        npages
            .checked_sub(self.first_page)
            .is_some_and(|rest| pages == rest || (pages < rest && pages.is_multiple_of(64)))
    }
}

/// Clears the bits of `words`; returns the pages that had been dirty.
fn clear_words(slot: &Slot, first_page: u64, words: &[u64]) -> Vec<DirtyWord> {
    let bitmap = slot
        .dirty
        .as_ref()
        .expect("logged_slot returns slots with a log");
    (first_page as usize / 64..)
        .zip(words)
        .map(|(index, word)| DirtyWord {
            index,
            mask: bitmap.clear(index, *word),
        })
        .filter(|word| word.mask != 0)
        .collect()
}
