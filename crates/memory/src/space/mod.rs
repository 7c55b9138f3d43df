//! The guest physical address space, as the monitor sees it: what lies at a guest's physical
//! address.
//!
//! A tree of regions says where RAM, ROM and devices are, which of them lies above which, and which
//! are windows onto others. It is the model of QEMU's `docs/devel/memory.rst`. The tree is rendered
//! to a [`FlatView`], a sorted list of ranges that do not overlap; memory slots follow the flat view.
//!
//! ```text
//!   root ┬ ram  0..3 GiB                 flat view:  0       ..a_0000   ram
//!        ├ vga  a_0000+2_0000  prio 1                a_0000  ..c_0000   vga (MMIO)
//!        ├ pam  c_0000+4_0000  prio 1                c_0000  ..10_0000  ram (by the alias, read-only)
//!        │  └ alias of ram at c_0000, read-only      10_0000 ..3 GiB    ram
//!        └ bios fff0_0000+10_0000                    fff0_0000..        bios (ROM)
//! ```
//!
//! # Rules
//! - A region has one parent at most; an alias may show any region, any number of times.
//! - Among overlapping siblings the higher priority wins; among equals, the one placed last.
//! - A region with children of its own shows through where they leave holes.
//! - The tree has no cycles, through aliases neither: [`Transaction::place`] refuses them.
//! - Changes are made in a [`Transaction`], on a copy. [`Transaction::commit`] renders it, publishes
//!   the view and tells [`Listener`]s the difference; an error leaves everything as it was.
//!
//! # Locks
//! One mutex orders transactions and is held while listeners are told. Readers take none: they hold
//! the view that they began with, and the RAM in it stays mapped for as long.

mod diff;
mod flat;
mod mapping;
mod slots;
mod transfer;
mod tree;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

use crate::sync::{Mutex, MutexGuard};

use arc_swap::ArcSwap;

pub use diff::{Difference, Listener, ListenerError};
pub use flat::{FlatRange, FlatView, Memory};
pub use mapping::{Access, MapError, Mapped};
pub use slots::{SlotAssigner, SlotCall, SlotsExhausted};
pub use transfer::TransferError;
pub use tree::{Enabled, Mmio, Protection, RamPiece, RegionId, RegionKind, SpaceError};

use tree::Tree;

/// The bytes of bounce buffers that may be out at one time, unless set otherwise.
const BOUNCE_LIMIT: u64 = 64 << 10;

/// A guest physical address space.
pub struct Space {
    state: Mutex<State>,
    view: ArcSwap<FlatView>,
    bounce_limit: u64,
    bounced: Arc<AtomicU64>,
}

struct State {
    tree: Tree,
    listeners: Vec<Box<dyn Listener>>,
}

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

impl Space {
    /// An empty space: a root container as large as addresses go.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                tree: Tree::new(),
                listeners: Vec::new(),
            }),
            view: ArcSwap::default(),
            bounce_limit: BOUNCE_LIMIT,
            bounced: Arc::default(),
        }
    }

    /// Another limit for the bytes of bounce buffers that are out at one time.
    #[must_use]
    pub fn with_bounce_limit(mut self, bytes: u64) -> Self {
        self.bounce_limit = bytes;
        self
    }

    /// The container that everything is placed in, in the end.
    pub fn root(&self) -> RegionId {
        RegionId::ROOT
    }

    /// The present view.
    pub fn view(&self) -> Arc<FlatView> {
        self.view.load_full()
    }

    /// Begins a change. Other transactions wait until this one is committed or dropped.
    pub fn transaction(&self) -> Transaction<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let tree = state.tree.clone();
        Transaction {
            space: self,
            state,
            tree,
        }
    }

    /// Adds a listener; it is told the present view as an addition first.
    pub fn listen(&self, mut listener: Box<dyn Listener>) -> Result<(), SpaceError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let all = Difference {
            removed: Vec::new(),
            added: self.view.load().ranges().to_vec(),
        };
        listener.changed(&all)?;
        state.listeners.push(listener);
        Ok(())
    }
}

/// A change of the tree, not yet visible. Dropping it changes nothing.
pub struct Transaction<'a> {
    space: &'a Space,
    state: MutexGuard<'a, State>,
    tree: Tree,
}

impl Transaction<'_> {
    /// A new region of `size` bytes, not yet placed anywhere.
    pub fn region(
        &mut self,
        name: &str,
        size: u64,
        kind: RegionKind,
    ) -> Result<RegionId, SpaceError> {
        self.tree.add(name, size, kind)
    }

    /// Places a region in another, `offset` bytes from its start.
    pub fn place(
        &mut self,
        parent: RegionId,
        child: RegionId,
        offset: u64,
        priority: i32,
    ) -> Result<(), SpaceError> {
        self.tree.place(parent, child, offset, priority)
    }

    /// Takes a region out of its parent.
    pub fn unplace(&mut self, region: RegionId) -> Result<(), SpaceError> {
        self.tree.unplace(region)
    }

    /// Forgets a region that is nowhere placed, has no children and is shown by no alias.
    pub fn remove(&mut self, region: RegionId) -> Result<(), SpaceError> {
        self.tree.remove(region)
    }

    /// Shows or hides a region with all that it holds.
    pub fn set_enabled(&mut self, region: RegionId, enabled: Enabled) -> Result<(), SpaceError> {
        self.tree.node_mut(region)?.enabled = enabled;
        Ok(())
    }

    /// Lets the guest write to what is seen through this region, or not.
    pub fn set_protection(
        &mut self,
        region: RegionId,
        protection: Protection,
    ) -> Result<(), SpaceError> {
        self.tree.node_mut(region)?.protection = protection;
        Ok(())
    }

    /// Moves a region within its parent.
    pub fn set_offset(&mut self, region: RegionId, offset: u64) -> Result<(), SpaceError> {
        self.tree.node_mut(region)?.offset = offset;
        Ok(())
    }

    /// Makes an alias show another part of its target.
    pub fn set_alias_offset(&mut self, alias: RegionId, offset: u64) -> Result<(), SpaceError> {
        self.tree.set_alias_offset(alias, offset)
    }

    /// Makes the change visible.
    ///
    /// An error of a listener comes after the change has been made; any other leaves everything as
    /// it was.
    pub fn commit(mut self) -> Result<Difference, SpaceError> {
        let view = FlatView::render(&self.tree)?;
        let difference = Difference::between(&self.space.view.load(), &view);
        self.state.tree = self.tree;
        self.space.view.store(Arc::new(view));
        if !difference.is_empty() {
            for listener in &mut self.state.listeners {
                listener.changed(&difference)?;
            }
        }
        Ok(difference)
    }
}

#[cfg(test)]
mod tests;
