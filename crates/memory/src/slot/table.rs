//! The slots of one address space, sorted by guest frame; immutable once published.
//!
//! Two levels: an array of chunks, each of at most [`CAPACITY`] slots. A change copies one or two
//! chunks and the array of pointers to them, so that a change among 32,764 slots copies some ten
//! kilobytes, while a look-up is two binary searches over dense arrays of numbers.

use std::ops::Deref;
use std::sync::Arc;

use addr::Gfn;
use arc_swap::{ArcSwap, Cache};

use super::{FrameSet, Slot, Slots};

/// Slots in one chunk, at most.
const CAPACITY: usize = 64;

/// The slots of one address space at one time.
#[derive(Clone, Debug, Default)]
pub struct Table {
    generation: u64,
    /// Frames whose slots may not be what the guest reaches there.
    private: Arc<FrameSet>,
    len: usize,
    /// The first frame of each chunk.
    firsts: Vec<u64>,
    chunks: Vec<Arc<Chunk>>,
}

/// Neighbouring slots.
#[derive(Debug)]
struct Chunk {
    /// The first frame of each slot, then [`NO_SLOT`]: the keys, in the chunk itself, so that a
    /// search of a cold chunk misses few cache lines.
    bases: [u64; CAPACITY],
    slots: Vec<Slot>,
}

/// Behind every frame: frame numbers have 52 bits.
const NO_SLOT: u64 = u64::MAX;

impl Chunk {
    fn from_slots(slots: Vec<Slot>) -> Self {
        let mut bases = [NO_SLOT; CAPACITY];
        for (base, slot) in bases.iter_mut().zip(&slots) {
            *base = slot.base_gfn.number();
        }
        Self { bases, slots }
    }
}

/// Where a slot stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Position {
    chunk: usize,
    slot: usize,
}

impl Table {
    /// Grows with every change of any slot of the machine.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The number of slots.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slot that holds a frame.
    #[inline]
    pub fn find(&self, gfn: Gfn) -> Option<&Slot> {
        self.position(gfn)
            .map(|p| self.at(p))
            .filter(|slot| slot.page_of(gfn).is_some())
    }

    /// Whether a frame is private: where no slot holds it, it is no device's, either.
    pub fn is_private(&self, gfn: Gfn) -> bool {
        self.private.contains(gfn.number())
    }

    pub(super) fn set_private(&mut self, private: Arc<FrameSet>) {
        self.private = private;
    }

    /// All slots, by guest frame.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.chunks.iter().flat_map(|c| &c.slots)
    }

    /// The slots that hold a frame of `from..to`, by guest frame.
    pub fn overlapping(&self, from: Gfn, to: Gfn) -> impl Iterator<Item = &Slot> {
        let start = self.position(from).unwrap_or_default();
        self.chunks
            .iter()
            .enumerate()
            .skip(start.chunk)
            .flat_map(move |(index, chunk)| {
                let skip = if index == start.chunk { start.slot } else { 0 };
                chunk.slots.iter().skip(skip)
            })
            .take_while(move |slot| slot.base_gfn < to)
            .filter(move |slot| slot.end_gfn() > from)
    }

    /// The last slot that begins at or before a frame.
    #[inline]
    fn position(&self, gfn: Gfn) -> Option<Position> {
        let gfn = gfn.number();
        let chunk = self
            .firsts
            .partition_point(|first| *first <= gfn)
            .checked_sub(1)?;
        let Chunk { bases, slots } = &*self.chunks[chunk];
        // No frame lies behind `NO_SLOT`, but a caller may ask for it.
        let behind = bases.partition_point(|base| *base <= gfn).min(slots.len());
        let slot = behind.checked_sub(1)?;
        Some(Position { chunk, slot })
    }

    fn at(&self, position: Position) -> &Slot {
        &self.chunks[position.chunk].slots[position.slot]
    }

    /// A copy with another generation.
    pub(super) fn with_generation(&self, generation: u64) -> Self {
        Self {
            generation,
            ..self.clone()
        }
    }

    /// Adds a slot that overlaps none.
    pub(super) fn insert(&mut self, slot: Slot) {
        let position = self.position(slot.base_gfn);
        let (chunk, at) = position.map_or((0, 0), |p| (p.chunk, p.slot + 1));
        let mut slots = self
            .chunks
            .get(chunk)
            .map_or_else(Vec::new, |c| c.slots.clone());
        slots.insert(at, slot);
        let old = usize::from(chunk < self.chunks.len());
        if slots.len() > CAPACITY {
            let upper = slots.split_off(slots.len() / 2);
            self.replace(chunk, old, [slots, upper]);
        } else {
            self.replace(chunk, old, [slots]);
        }
        self.len += 1;
    }

    /// Removes the slot that begins at this frame; returns it.
    pub(super) fn remove(&mut self, base: Gfn) -> Option<Slot> {
        let position = self.position(base)?;
        let mut slots = self.chunks[position.chunk].slots.clone();
        if slots[position.slot].base_gfn != base {
            return None;
        }
        let removed = slots.remove(position.slot);
        self.len -= 1;
        let next = self.chunks.get(position.chunk + 1);
        match next.filter(|next| next.slots.len() + slots.len() <= CAPACITY / 2) {
            Some(next) => {
                slots.extend(next.slots.iter().cloned());
                self.replace(position.chunk, 2, [slots]);
            }
            None if slots.is_empty() => self.replace(position.chunk, 1, []),
            None => self.replace(position.chunk, 1, [slots]),
        }
        Some(removed)
    }

    /// Puts new chunks in the place of `count` old ones.
    fn replace<const N: usize>(&mut self, at: usize, count: usize, new: [Vec<Slot>; N]) {
        let firsts = new.each_ref().map(|slots| slots[0].base_gfn.number());
        self.firsts.splice(at..at + count, firsts);
        let chunks = new.map(|slots| Arc::new(Chunk::from_slots(slots)));
        self.chunks.splice(at..at + count, chunks);
    }

    /// Panics where the order or a number is wrong.
    pub fn check_invariants(&self) {
        assert_eq!(self.firsts.len(), self.chunks.len());
        assert_eq!(self.len, self.iter().count());
        for (first, chunk) in self.firsts.iter().zip(&self.chunks) {
            assert!(
                (1..=CAPACITY).contains(&chunk.slots.len()),
                "a chunk of no or too many slots"
            );
            let behind = &chunk.bases[chunk.slots.len()..];
            assert!(
                behind.iter().all(|base| *base == NO_SLOT),
                "a key without a slot"
            );
            assert_eq!(*first, chunk.bases[0]);
            for (base, slot) in chunk.bases.iter().zip(&chunk.slots) {
                assert_eq!(*base, slot.base_gfn.number());
                assert!(slot.npages > 0, "an empty slot");
            }
        }
        let ends = self.iter().map(Slot::end_gfn);
        for (end, next) in ends.zip(self.iter().skip(1)) {
            assert!(end <= next.base_gfn, "{:?} overlaps its neighbour", next.id);
        }
    }
}

/// A reader of one address space that remembers the table and the slot of its last look-up.
///
/// For one thread (a vCPU's). While the table is unchanged, a look-up costs one load and one
/// comparison more than the search, and no search at all where it hits the last slot again.
pub struct Reader {
    cache: Cache<Place, Arc<Table>>,
    last: Option<Hit>,
}

/// The slot of the last look-up, with what says whether it is that of the next one, too.
#[derive(Clone, Copy)]
struct Hit {
    generation: u64,
    base: u64,
    npages: u64,
    position: Position,
}

impl Hit {
    fn holds(&self, generation: u64, gfn: Gfn) -> bool {
        self.generation == generation && gfn.number().wrapping_sub(self.base) < self.npages
    }
}

/// Where the table of an address space is published.
struct Place {
    slots: Arc<Slots>,
    address_space: usize,
}

impl Deref for Place {
    type Target = ArcSwap<Table>;

    fn deref(&self) -> &Self::Target {
        self.slots.table(self.address_space)
    }
}

impl Reader {
    pub(super) fn new(slots: Arc<Slots>, address_space: usize) -> Self {
        let place = Place {
            slots,
            address_space,
        };
        Self {
            cache: Cache::new(place),
            last: None,
        }
    }

    /// The present table.
    pub fn table(&mut self) -> &Arc<Table> {
        self.cache.load()
    }

    /// The slot that holds a frame, in the present table.
    #[inline]
    pub fn find(&mut self, gfn: Gfn) -> Option<&Slot> {
        let table = self.cache.load();
        if let Some(last) = self.last.filter(|l| l.holds(table.generation, gfn)) {
            return Some(table.at(last.position));
        }
        let position = table.position(gfn)?;
        let slot = table.at(position);
        slot.page_of(gfn)?;
        self.last = Some(Hit {
            generation: table.generation,
            base: slot.base_gfn.number(),
            npages: slot.npages,
            position,
        });
        Some(slot)
    }
}
