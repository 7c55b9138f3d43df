//! What a transaction changed.

use super::flat::{FlatRange, FlatView};

/// What a listener may fail with.
pub type ListenerError = Box<dyn std::error::Error + Send + Sync>;

/// Follows the flat view: memory slots, eventfds, a trace.
pub trait Listener: Send {
    /// The view has changed. Removals are to be made first: additions may lie where they were.
    fn changed(&mut self, difference: &Difference) -> Result<(), ListenerError>;
}

/// The ranges that only one of two views has. A range that grew is removed and added.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// What is gone.
    pub removed: Vec<FlatRange>,
    /// What is new.
    pub added: Vec<FlatRange>,
}

impl Difference {
    /// From one view to another.
    pub fn between(old: &FlatView, new: &FlatView) -> Self {
        Self {
            removed: missing(old, new),
            added: missing(new, old),
        }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }
}

/// The ranges of `from` that `other` does not have.
fn missing(from: &FlatView, other: &FlatView) -> Vec<FlatRange> {
    from.ranges()
        .iter()
        .filter(|r| !other.find(r.range.start()).is_some_and(|o| o.is_same(r)))
        .cloned()
        .collect()
}
