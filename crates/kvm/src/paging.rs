//! Which tables lead from guest addresses to host addresses.

/// The three ways; a guest sees no difference between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PagingPath {
    /// Guest tables, then a second level from guest physical to host addresses.
    #[default]
    Nested,
    /// Shadow tables that hold both steps in one, coherent with the guest's tables.
    Shadow,
    /// No table of ours: each TLB fill walks the guest's tables and the slots.
    Direct,
}
