//! Faults as they happen: recorded without a lock, read by whoever listens, summed up, traced.
//!
//! ```text
//!   vCPU 0 ─ Recorder::fault ─ ring 0 ─┐
//!   vCPU 1 ─ Recorder::fault ─ ring 1 ─┴─ Recorder::drain ─ FaultRecord ─┬─ Summary
//!                                                                        └─ Trace (Perfetto)
//! ```
//!
//! A ring that is full takes no more: what is lost is counted, and told with what is not.

mod record;
mod recorder;
mod summary;
mod trace;

pub use record::{FaultFilter, FaultRecord, Install, Line};
pub use recorder::{Recorder, RingObserver};
pub use summary::{Counting, Summary, Totals};
pub use trace::Trace;
