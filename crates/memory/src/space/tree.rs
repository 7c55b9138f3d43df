//! The regions and their places in each other.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;

use super::ListenerError;
use crate::dirty::{DirtyBitmap, NoMemory};
use crate::ram::GuestRam;

/// The name of a region; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u32);

impl RegionId {
    pub(super) const ROOT: Self = Self(0);
}

/// A device's registers.
pub trait Mmio: Send + Sync {
    /// Reads 1, 2, 4 or 8 bytes, naturally aligned, `offset` bytes into the region.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes 1, 2, 4 or 8 bytes, naturally aligned.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A piece of guest RAM that a region shows.
#[derive(Clone)]
pub struct RamPiece {
    /// The block.
    pub ram: GuestRam,
    /// Where the piece begins in the block.
    pub offset: u64,
    /// Pages that the monitor wrote (a device's DMA), counted from the start of the block.
    pub dirty: Arc<DirtyBitmap>,
}

impl RamPiece {
    /// From `offset` in a block, with a log of its own.
    pub fn new(ram: GuestRam, offset: u64) -> Result<Self, NoMemory> {
        let dirty = Arc::new(DirtyBitmap::new(ram.size().div_ceil(4096))?);
        Ok(Self { ram, offset, dirty })
    }
}

/// What a region is.
#[derive(Clone)]
pub enum RegionKind {
    /// Nothing itself; holds others.
    Container,
    /// Memory. What the guest writes where it is read-only goes to `on_write`, or nowhere: a ROM, or
    /// flash with commands.
    Ram {
        /// The memory.
        piece: RamPiece,
        /// Who takes the writes to read-only memory.
        on_write: Option<Arc<dyn Mmio>>,
    },
    /// A device.
    Mmio(Arc<dyn Mmio>),
    /// A window onto another region.
    Alias {
        /// The region that shows.
        target: RegionId,
        /// The byte of it that is the window's first.
        offset: u64,
    },
}

impl RegionKind {
    /// All of a block, writable.
    pub fn ram(ram: &GuestRam) -> Result<Self, NoMemory> {
        Ok(Self::Ram {
            piece: RamPiece::new(ram.clone(), 0)?,
            on_write: None,
        })
    }
}

impl fmt::Debug for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container => f.write_str("container"),
            Self::Ram { piece, .. } => write!(f, "ram at {}+{:#x}", piece.ram.hva(), piece.offset),
            Self::Mmio(_) => f.write_str("mmio"),
            Self::Alias { target, offset } => write!(f, "alias of {target:?}+{offset:#x}"),
        }
    }
}

/// Whether a region takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enabled {
    /// It does.
    Yes,
    /// Neither it nor what it holds.
    No,
}

/// What the guest may do with memory seen through a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protection {
    /// Read and write.
    ReadWrite,
    /// Read; writes go elsewhere. It holds for everything below the region, too.
    ReadOnly,
}

/// Why the tree can't be changed so.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// It was removed, or belongs to another space.
    #[error("there is no region {0:?}")]
    NoSuchRegion(RegionId),
    /// A region of no bytes, or RAM larger than its block.
    #[error("region {name} can't have {size:#x} bytes")]
    Size {
        /// Its name.
        name: String,
        /// Its size.
        size: u64,
    },
    /// A region has one parent at most; the root has none.
    #[error("region {0:?} is placed already")]
    Placed(RegionId),
    /// It is in use: placed, with children, or shown by an alias.
    #[error("region {0:?} is in use")]
    InUse(RegionId),
    /// It would hold itself.
    #[error("region {child:?} reaches {parent:?} already")]
    Cycle {
        /// Where it was to be placed.
        parent: RegionId,
        /// The region to be placed.
        child: RegionId,
    },
    /// Only aliases have a target.
    #[error("region {0:?} is no alias")]
    NotAnAlias(RegionId),
    /// The flat view would have more ranges than any machine needs (windows onto windows multiply).
    #[error("the flat view has more than {0} pieces")]
    TooComplex(usize),
    /// A listener failed; the change has been made.
    #[error("a listener of the address space")]
    Listener(#[from] ListenerError),
}

/// One region and its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: Arc<str>,
    pub(super) size: u64,
    pub(super) kind: RegionKind,
    pub(super) enabled: Enabled,
    pub(super) protection: Protection,
    pub(super) offset: u64,
    pub(super) priority: i32,
    parent: Option<RegionId>,
    /// From the one that wins to the one that loses.
    pub(super) children: Vec<RegionId>,
}

impl Node {
    fn new(name: &str, size: u64, kind: RegionKind) -> Self {
        Self {
            name: name.into(),
            size,
            kind,
            enabled: Enabled::Yes,
            protection: Protection::ReadWrite,
            offset: 0,
            priority: 0,
            parent: None,
            children: Vec::new(),
        }
    }

    /// Everything that shows through this region.
    fn shows(&self) -> impl Iterator<Item = RegionId> {
        let target = match self.kind {
            RegionKind::Alias { target, .. } => Some(target),
            _ => None,
        };
        self.children.iter().copied().chain(target)
    }
}

/// All regions of a space.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    nodes: BTreeMap<RegionId, Arc<Node>>,
    next: u32,
}

impl Tree {
    pub(super) fn new() -> Self {
        let root = Arc::new(Node::new("root", u64::MAX, RegionKind::Container));
        Self {
            nodes: BTreeMap::from([(RegionId::ROOT, root)]),
            next: 1,
        }
    }

    pub(super) fn node(&self, id: RegionId) -> Result<&Node, SpaceError> {
        self.nodes
            .get(&id)
            .map(|n| &**n)
            .ok_or(SpaceError::NoSuchRegion(id))
    }

    pub(super) fn node_mut(&mut self, id: RegionId) -> Result<&mut Node, SpaceError> {
        self.nodes
            .get_mut(&id)
            .map(Arc::make_mut)
            .ok_or(SpaceError::NoSuchRegion(id))
    }

    pub(super) fn add(
        &mut self,
        name: &str,
        size: u64,
        kind: RegionKind,
    ) -> Result<RegionId, SpaceError> {
        let fits = match &kind {
            RegionKind::Ram { piece, .. } => piece
                .offset
                .checked_add(size)
                .is_some_and(|end| end <= piece.ram.size()),
            RegionKind::Alias { target, .. } => self.node(*target).map(|_| true)?,
            RegionKind::Container | RegionKind::Mmio(_) => true,
        };
        if size == 0 || !fits {
            return Err(SpaceError::Size {
                name: name.into(),
                size,
            });
        }
        let id = RegionId(self.next);
        self.next += 1;
        self.nodes.insert(id, Arc::new(Node::new(name, size, kind)));
        Ok(id)
    }

    pub(super) fn place(
        &mut self,
        parent: RegionId,
        child: RegionId,
        offset: u64,
        priority: i32,
    ) -> Result<(), SpaceError> {
        self.node(parent)?;
        if child == RegionId::ROOT || self.node(child)?.parent.is_some() {
            return Err(SpaceError::Placed(child));
        }
        if self.reaches(child, parent) {
            return Err(SpaceError::Cycle { parent, child });
        }
        let node = self.node_mut(child)?;
        node.parent = Some(parent);
        node.offset = offset;
        node.priority = priority;
        let siblings = &self.node(parent)?.children;
        let before = siblings
            .iter()
            .position(|s| self.nodes[s].priority <= priority)
            .unwrap_or(siblings.len());
        self.node_mut(parent)?.children.insert(before, child);
        Ok(())
    }

    pub(super) fn unplace(&mut self, child: RegionId) -> Result<(), SpaceError> {
        if let Some(parent) = self.node_mut(child)?.parent.take() {
            self.node_mut(parent)?.children.retain(|c| *c != child);
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, id: RegionId) -> Result<(), SpaceError> {
        let node = self.node(id)?;
        let placed = node.parent.is_some() || id == RegionId::ROOT;
        let shown = self.nodes.values().any(|n| n.shows().any(|s| s == id));
        if placed || shown || !node.children.is_empty() {
            return Err(SpaceError::InUse(id));
        }
        self.nodes.remove(&id);
        Ok(())
    }

    pub(super) fn set_alias_offset(&mut self, id: RegionId, to: u64) -> Result<(), SpaceError> {
        match &mut self.node_mut(id)?.kind {
            RegionKind::Alias { offset, .. } => *offset = to,
            _ => return Err(SpaceError::NotAnAlias(id)),
        }
        Ok(())
    }

    /// Whether `to` shows somewhere in `from`.
    fn reaches(&self, from: RegionId, to: RegionId) -> bool {
        let mut seen = HashSet::new();
        let mut open = vec![from];
        while let Some(id) = open.pop() {
            if id == to {
                return true;
            }
            if seen.insert(id) {
                open.extend(self.nodes.get(&id).into_iter().flat_map(|n| n.shows()));
            }
        }
        false
    }
}
