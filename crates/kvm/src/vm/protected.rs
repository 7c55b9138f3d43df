//! `KVM_X86_SW_PROTECTED_VM`: memory slots of which each page is shared with the monitor or private.
//!
//! A slot of such a VM has up to two memories: the monitor's (`userspace_addr`) and one of a
//! [`GuestMemory`]. `KVM_SET_MEMORY_ATTRIBUTES` says for each frame which of the two the guest reaches.
//! Below, in [`memory::slot`], a slot has one memory; so each slot of the program stands there as
//! pieces, one for each run of frames of one kind. Private frames of a slot without private memory
//! have no piece: what the guest does there leaves with `KVM_EXIT_MEMORY_FAULT`. A change of attributes
//! replaces the pieces that it touches, all at once.
//!
//! Slots with private memory have no dirty log (`EINVAL`, as in kvm.ko 6.12); of others, the log is put
//! together from its pieces' ([`log`]). Dirty rings name a piece, where a slot has several.

mod log;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::memory::slot::{FrameSet, Inside, Region, SlotId, USER_SLOTS};
use addr::{Address, Frame, Gfn, Hva, PageSize};
use kvm_bindings as kb;

use self::log::Carried;
use super::Shared;
use crate::errno::Errno;
use crate::guest_memory::GuestMemory;

const PAGE: u64 = PageSize::Size4K.bytes();
const CHANGEABLE: u32 = kb::KVM_MEM_LOG_DIRTY_PAGES;

/// The slots of a protected VM, as the program sees them.
#[derive(Default)]
pub(super) struct Protected(Mutex<State>);

#[derive(Default)]
struct State {
    slots: BTreeMap<u16, UserSlot>,
    private: FrameSet,
    pieces: Pieces,
}

/// The slots below.
#[derive(Clone, Default)]
struct Pieces {
    /// By the slot of the program whose parts they are.
    of: BTreeMap<u16, Vec<Piece>>,
    /// Numbers that pieces have.
    taken: BTreeSet<u16>,
}

struct UserSlot {
    flags: u32,
    frames: Range<u64>,
    hva: Hva,
    private: Option<Bound>,
    /// What its dirty log holds besides its pieces' logs.
    carried: Carried,
}

/// A slot's part of a guest memory file.
struct Bound {
    memory: Arc<GuestMemory>,
    part: Range<u64>,
    hva: Hva,
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.memory.unbind(&self.part);
    }
}

/// A run of frames of one kind, and the slot below that serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    number: u16,
    frames: Range<u64>,
    hva: Hva,
}

/// Private memory for a slot to come: the file, and where in it.
pub(super) struct Source {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) offset: u64,
}

impl UserSlot {
    fn overlaps(&self, frames: &Range<u64>) -> bool {
        self.frames.start < frames.end && frames.start < self.frames.end
    }

    /// What its pieces are to be; without numbers.
    fn plan(&self, private: &FrameSet) -> Vec<(Range<u64>, Hva)> {
        let at = |base: Hva, frames: &Range<u64>| {
            base.wrapping_add((frames.start - self.frames.start) * PAGE)
        };
        let pieces = private.split(self.frames.clone()).into_iter();
        let placed = pieces.filter_map(|(frames, inside)| {
            let hva = match (inside, &self.private) {
                (Inside::No, _) => at(self.hva, &frames),
                (Inside::Yes, Some(bound)) => at(bound.hva, &frames),
                (Inside::Yes, None) => return None,
            };
            Some((frames, hva))
        });
        placed.collect()
    }
}

/// What is to be done below.
#[derive(Default)]
struct Changes {
    gone: Vec<SlotId>,
    new: Vec<Region>,
}

impl Pieces {
    /// A number for a piece of slot `number`; preferably that one.
    fn free_number(&mut self, number: u16) -> Result<u16, Errno> {
        let others = (0..USER_SLOTS).rev();
        let free = std::iter::once(number)
            .chain(others)
            .find(|n| !self.taken.contains(n));
        let free = free.ok_or(Errno::ENOSPC)?;
        self.taken.insert(free);
        Ok(free)
    }

    /// Gives a slot the pieces that `private` asks for; those that stay as they are keep their numbers.
    fn arrange(
        &mut self,
        number: u16,
        slot: &UserSlot,
        private: &FrameSet,
        changes: &mut Changes,
    ) -> Result<(), Errno> {
        let plan = slot.plan(private);
        let (kept, gone): (Vec<_>, Vec<_>) = self
            .remove(number)
            .into_iter()
            .partition(|p| plan.iter().any(|(f, h)| *f == p.frames && *h == p.hva));
        changes.take(&gone);
        self.taken.extend(kept.iter().map(|p| p.number));
        let mut pieces = Vec::with_capacity(plan.len());
        for (frames, hva) in plan {
            if let Some(piece) = kept.iter().find(|p| p.frames == frames) {
                pieces.push(piece.clone());
                continue;
            }
            let piece = Piece {
                number: self.free_number(number)?,
                frames,
                hva,
            };
            changes.new.push(region(&piece, slot.flags));
            pieces.push(piece);
        }
        self.of.insert(number, pieces);
        Ok(())
    }

    fn remove(&mut self, number: u16) -> Vec<Piece> {
        let gone = self.of.remove(&number).unwrap_or_default();
        for piece in &gone {
            self.taken.remove(&piece.number);
        }
        gone
    }
}

impl Changes {
    fn take(&mut self, pieces: &[Piece]) {
        let ids = pieces.iter().map(|p| SlotId::new(p.number.into()));
        self.gone.extend(ids);
    }
}

fn region(piece: &Piece, flags: u32) -> Region {
    Region {
        slot: piece.number.into(),
        flags: flags & !kb::KVM_MEM_GUEST_MEMFD,
        gpa: Gfn::new(piece.frames.start).start(),
        size: (piece.frames.end - piece.frames.start) * PAGE,
        hva: piece.hva,
    }
}

impl Protected {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `KVM_SET_USER_MEMORY_REGION2`. `source` is there where the flags ask for private memory.
    pub(super) fn set_region(
        &self,
        vm: &Arc<Shared>,
        asked: &Region,
        source: Option<Source>,
    ) -> Result<(), Errno> {
        let number = u16::try_from(asked.slot).map_err(|_| Errno::EINVAL)?;
        let aligned = asked.size.is_multiple_of(PAGE)
            && asked.gpa.is_aligned(PageSize::Size4K)
            && asked.hva.is_aligned(PageSize::Size4K);
        if !aligned || number >= USER_SLOTS || asked.gpa.checked_add(asked.size).is_none() {
            return Err(Errno::EINVAL);
        }
        let first = asked.gpa.frame().number();
        let frames = first..first + asked.size / PAGE;
        let mut state = self.lock();
        if frames.is_empty() {
            return state.delete(vm, number);
        }
        let others = state.slots.iter().filter(|(n, _)| **n != number);
        if others.into_iter().any(|(_, slot)| slot.overlaps(&frames)) {
            return Err(Errno::EEXIST);
        }
        if state.slots.contains_key(&number) {
            return state.change(vm, number, asked, &frames);
        }
        let private = source
            .map(|source| {
                let Source { memory, offset } = source;
                let hva = memory.bind(vm, offset, asked.size)?;
                let part = offset..offset + asked.size;
                Ok::<_, Errno>(Bound { memory, part, hva })
            })
            .transpose()?;
        let slot = UserSlot {
            flags: asked.flags,
            carried: Carried::begin(vm, asked.flags, &frames),
            frames,
            hva: asked.hva,
            private,
        };
        state.place(vm, number, slot)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub(super) fn set_private(
        &self,
        vm: &Arc<Shared>,
        frames: &Range<u64>,
        inside: Inside,
    ) -> Result<(), Errno> {
        let mut state = self.lock();
        let mut private = state.private.clone();
        match inside {
            Inside::Yes => private.insert(frames.clone()),
            Inside::No => private.remove(frames),
        }
        let mut pieces = state.pieces.clone();
        let mut changes = Changes::default();
        for (number, slot) in state.slots.iter().filter(|(_, s)| s.overlaps(frames)) {
            pieces.arrange(*number, slot, &private, &mut changes)?;
        }
        state.apply(vm, &changes, pieces, private)
    }
}

impl State {
    /// An error changes nothing.
    fn apply(
        &mut self,
        vm: &Shared,
        changes: &Changes,
        pieces: Pieces,
        private: FrameSet,
    ) -> Result<(), Errno> {
        let slots = vm.slots();
        let logs = self.logs_of(slots, &changes.gone);
        let done = slots.replace(&changes.gone, &changes.new, private.clone());
        done.map_err(|error| Errno(error.errno()))?;
        // Nobody marks any more: what the pieces logged is complete.
        self.carry(&logs);
        self.pieces = pieces;
        self.private = private;
        Ok(())
    }

    fn delete(&mut self, vm: &Shared, number: u16) -> Result<(), Errno> {
        self.take_away(vm, number).map(drop)
    }

    /// The slot that was deleted.
    fn take_away(&mut self, vm: &Shared, number: u16) -> Result<UserSlot, Errno> {
        if !self.slots.contains_key(&number) {
            return Err(Errno::EINVAL);
        }
        let mut pieces = self.pieces.clone();
        let mut changes = Changes::default();
        changes.take(&pieces.remove(number));
        self.apply(vm, &changes, pieces, self.private.clone())?;
        self.slots.remove(&number).ok_or(Errno::EINVAL)
    }

    /// A new slot.
    fn place(&mut self, vm: &Shared, number: u16, slot: UserSlot) -> Result<(), Errno> {
        let mut pieces = self.pieces.clone();
        let mut changes = Changes::default();
        pieces.arrange(number, &slot, &self.private, &mut changes)?;
        self.apply(vm, &changes, pieces, self.private.clone())?;
        self.slots.insert(number, slot);
        Ok(())
    }

    /// A slot that exists: only ordinary ones change, in their flags or their place.
    fn change(
        &mut self,
        vm: &Shared,
        number: u16,
        asked: &Region,
        frames: &Range<u64>,
    ) -> Result<(), Errno> {
        let slot = self.slots.get_mut(&number).ok_or(Errno::EINVAL)?;
        let same_size = slot.frames.end - slot.frames.start == frames.end - frames.start;
        let fixed = slot.private.is_some() || (slot.flags ^ asked.flags) & !CHANGEABLE != 0;
        if fixed || !same_size || slot.hva != asked.hva {
            return Err(Errno::EINVAL);
        }
        if slot.frames == *frames {
            for piece in self.pieces.of.get(&number).into_iter().flatten() {
                let changed = vm.slots().set_region(&region(piece, asked.flags));
                changed.map_err(|error| Errno(error.errno()))?;
            }
            if slot.flags != asked.flags {
                slot.carried = Carried::begin(vm, asked.flags, frames);
            }
            slot.flags = asked.flags;
            return Ok(());
        }
        let old = self.take_away(vm, number)?;
        let slot = UserSlot {
            flags: asked.flags,
            carried: if old.flags == asked.flags {
                old.carried.clone()
            } else {
                Carried::begin(vm, asked.flags, frames)
            },
            frames: frames.clone(),
            hva: asked.hva,
            private: None,
        };
        self.place(vm, number, slot)
    }
}
