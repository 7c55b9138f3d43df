//! Counters: why translated code left, and what was translated.

use mmu::stats::EngineStats;

use super::vcpu::Vcpu;
use crate::translate::Reason;

impl Vcpu {
    pub(super) fn counters(&self) -> &EngineStats {
        &self.memory.mmu.stats().engine
    }

    /// Counts a way out of translated code.
    pub(super) fn count(&self, reason: &Reason) {
        let counters = self.counters();
        let counter = match reason {
            Reason::Access(_) => &counters.exit_access,
            Reason::Span(..) => &counters.exit_span,
            Reason::Loop(_) => &counters.exit_loop,
            Reason::Segment(_) => &counters.exit_segment,
            Reason::Link { .. } => &counters.exit_link,
            Reason::Indirect => &counters.exit_indirect,
            Reason::Stale | Reason::Branch(_) => &counters.exit_stale,
            Reason::Poll => &counters.exit_poll,
            Reason::System { .. } => &counters.exit_system,
            Reason::Rust { .. } => &counters.exit_rust,
            Reason::Raise { .. } | Reason::Limit { .. } => &counters.exit_raise,
            Reason::Commit | Reason::CommitIndirect => &counters.exit_commit,
            Reason::HostFault => &counters.exit_trap,
        };
        counter.increment();
    }
}
