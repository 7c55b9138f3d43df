//! The tree rendered to a list of ranges.

use std::fmt;
use std::sync::Arc;

use addr::{Address, Gpa, GpaRange, Hva};

use super::tree::{
    Enabled, Mmio, Node, Protection, RamPiece, RegionId, RegionKind, SpaceError, Tree,
};

/// Regions that rendering visits, at most. Machines have hundreds.
const MAX_VISITS: usize = 1 << 16;

/// What lies behind a range.
#[derive(Clone)]
pub enum Memory {
    /// Memory.
    Ram {
        /// The memory that the *region* shows.
        piece: RamPiece,
        /// What the guest may do.
        protection: Protection,
        /// Who takes writes where it is read-only.
        on_write: Option<Arc<dyn Mmio>>,
    },
    /// A device.
    Mmio(Arc<dyn Mmio>),
}

/// Neighbouring bytes that one region shows.
#[derive(Clone)]
pub struct FlatRange {
    /// Where the guest sees them.
    pub range: GpaRange,
    /// The region.
    pub region: RegionId,
    /// Its name.
    pub name: Arc<str>,
    /// Where they begin in the region.
    pub offset: u64,
    /// What is there.
    pub memory: Memory,
}

impl FlatRange {
    /// Where the range begins in its block of RAM; `None` for a device.
    pub fn ram_offset(&self) -> Option<u64> {
        match &self.memory {
            Memory::Ram { piece, .. } => Some(piece.offset + self.offset),
            Memory::Mmio(_) => None,
        }
    }

    /// Where the range begins in the monitor; `None` for a device.
    pub fn hva(&self) -> Option<Hva> {
        match &self.memory {
            Memory::Ram { piece, .. } => Some(piece.ram.hva().wrapping_add(self.ram_offset()?)),
            Memory::Mmio(_) => None,
        }
    }

    /// What the guest may do; devices take everything.
    pub fn protection(&self) -> Protection {
        match &self.memory {
            Memory::Ram { protection, .. } => *protection,
            Memory::Mmio(_) => Protection::ReadWrite,
        }
    }

    /// Whether it is memory.
    pub fn is_ram(&self) -> bool {
        matches!(self.memory, Memory::Ram { .. })
    }

    /// The same bytes of the same region with the same rights.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.range == other.range && self.offset == other.offset && self.is_alike(other)
    }

    fn is_alike(&self, other: &Self) -> bool {
        self.region == other.region && self.protection() == other.protection()
    }

    /// Whether `next` goes on where `self` ends.
    fn continues_in(&self, next: &Self) -> bool {
        self.range.end() == next.range.start()
            && self.offset + self.range.len() == next.offset
            && self.is_alike(next)
    }

    /// The part of it that lies in `range`.
    fn clipped(&self, range: GpaRange) -> Option<Self> {
        let inside = self.range.intersection(range)?;
        let skipped = inside.start().offset_from(self.range.start())?;
        Some(Self {
            range: inside,
            offset: self.offset + skipped,
            ..self.clone()
        })
    }
}

impl fmt::Debug for FlatRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (&self.memory, self.protection()) {
            (Memory::Mmio(_), _) => "mmio",
            (_, Protection::ReadWrite) => "ram",
            (_, Protection::ReadOnly) => "rom",
        };
        write!(f, "{} {kind} {}+{:#x}", self.range, self.name, self.offset)
    }
}

/// What lies at each guest physical address.
#[derive(Clone, Debug, Default)]
pub struct FlatView {
    ranges: Vec<FlatRange>,
}

impl FlatView {
    /// The ranges, sorted; what lies between them is a hole.
    pub fn ranges(&self) -> &[FlatRange] {
        &self.ranges
    }

    /// The range that holds an address.
    pub fn find(&self, gpa: Gpa) -> Option<&FlatRange> {
        let behind = self.ranges.partition_point(|r| r.range.start() <= gpa);
        self.ranges[..behind]
            .last()
            .filter(|r| r.range.contains(gpa))
    }

    pub(super) fn render(tree: &Tree) -> Result<Self, SpaceError> {
        let mut renderer = Renderer {
            tree,
            ranges: Vec::new(),
            visits: 0,
        };
        let everything = Span {
            from: 0,
            to: i128::from(u64::MAX),
        };
        renderer.region(RegionId::ROOT, 0, everything, Protection::ReadWrite)?;
        Ok(Self {
            ranges: merge(renderer.ranges),
        })
    }

    /// Panics where ranges are empty, unsorted, overlap, or should be one.
    pub fn check_invariants(&self) {
        assert!(
            self.ranges.iter().all(|r| !r.range.is_empty()),
            "an empty range"
        );
        for pair in self.ranges.windows(2) {
            assert!(
                pair[0].range.end() <= pair[1].range.start(),
                "{pair:?} overlap"
            );
            assert!(!pair[0].continues_in(&pair[1]), "{pair:?} are one");
        }
    }
}

/// Addresses while they may still lie outside the space: an alias begins before its window.
#[derive(Clone, Copy)]
struct Span {
    from: i128,
    to: i128,
}

impl Span {
    fn clip(self, other: Self) -> Option<Self> {
        let clipped = Self {
            from: self.from.max(other.from),
            to: self.to.min(other.to),
        };
        (clipped.from < clipped.to).then_some(clipped)
    }

    /// Inside the space: everything is clipped to the root, whose bounds are 64-bit numbers.
    fn range(self) -> GpaRange {
        GpaRange::between(Gpa::new(self.from as u64), Gpa::new(self.to as u64))
            .expect("a clipped span is not empty")
    }
}

struct Renderer<'t> {
    tree: &'t Tree,
    /// Sorted, not overlapping.
    ranges: Vec<FlatRange>,
    visits: usize,
}

impl Renderer<'_> {
    /// Renders a region that begins at `base`, in the holes of `clip`.
    fn region(
        &mut self,
        id: RegionId,
        base: i128,
        clip: Span,
        inherited: Protection,
    ) -> Result<(), SpaceError> {
        let node = self.tree.node(id)?;
        let whole = Span {
            from: base,
            to: base + i128::from(node.size),
        };
        let Some(seen) = whole.clip(clip).filter(|_| node.enabled == Enabled::Yes) else {
            return Ok(());
        };
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return Err(SpaceError::TooComplex(MAX_VISITS));
        }
        let protection = match node.protection {
            Protection::ReadOnly => Protection::ReadOnly,
            Protection::ReadWrite => inherited,
        };
        for child in &node.children {
            let at = base + i128::from(self.tree.node(*child)?.offset);
            self.region(*child, at, seen, protection)?;
        }
        match &node.kind {
            RegionKind::Container => Ok(()),
            RegionKind::Alias { target, offset } => {
                self.region(*target, base - i128::from(*offset), seen, protection)
            }
            RegionKind::Ram { piece, on_write } => {
                let (piece, on_write) = (piece.clone(), on_write.clone());
                self.fill(
                    id,
                    node,
                    base,
                    seen,
                    &Memory::Ram {
                        piece,
                        protection,
                        on_write,
                    },
                );
                Ok(())
            }
            RegionKind::Mmio(device) => {
                self.fill(id, node, base, seen, &Memory::Mmio(device.clone()));
                Ok(())
            }
        }
    }

    /// Puts a region's bytes where nothing is yet.
    fn fill(&mut self, id: RegionId, node: &Node, base: i128, seen: Span, memory: &Memory) {
        let range = seen.range();
        let whole = FlatRange {
            range,
            region: id,
            name: node.name.clone(),
            offset: (seen.from - base) as u64,
            memory: memory.clone(),
        };
        let first = self
            .ranges
            .partition_point(|r| r.range.end() <= range.start());
        let behind = self
            .ranges
            .partition_point(|r| r.range.start() < range.end());
        let mut pieces = Vec::new();
        let mut from = range.start();
        for taken in &self.ranges[first..behind] {
            pieces.extend(hole(from, taken.range.start()).and_then(|h| whole.clipped(h)));
            pieces.push(taken.clone());
            from = taken.range.end();
        }
        pieces.extend(hole(from, range.end()).and_then(|h| whole.clipped(h)));
        self.ranges.splice(first..behind, pieces);
    }
}

fn hole(from: Gpa, to: Gpa) -> Option<GpaRange> {
    GpaRange::between(from, to).filter(|r| !r.is_empty())
}

fn merge(ranges: Vec<FlatRange>) -> Vec<FlatRange> {
    let mut merged: Vec<FlatRange> = Vec::with_capacity(ranges.len());
    for next in ranges {
        match merged.last_mut().filter(|last| last.continues_in(&next)) {
            Some(last) => {
                last.range = GpaRange::between(last.range.start(), next.range.end())
                    .expect("the next range lies behind");
            }
            None => merged.push(next),
        }
    }
    merged
}
