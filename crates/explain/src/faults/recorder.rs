//! Faults between the vCPU threads and whoever reads them.
//!
//! A vCPU's thread pushes to its own ring: no lock, no system call, no allocation. Readers drain all
//! rings together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_queue::ArrayQueue;
use mmu::event::{FaultEvent, Subscriber};

use super::record::{FaultRecord, Line};

/// Faults that one ring holds.
const CAPACITY: usize = 1 << 15;

struct Ring {
    queue: ArrayQueue<(u64, FaultEvent)>,
    dropped: AtomicU64,
}

/// One ring for each vCPU.
pub struct Recorder {
    began: Instant,
    rings: Vec<Ring>,
}

impl Recorder {
    /// For so many vCPUs.
    pub fn new(vcpus: usize) -> Arc<Self> {
        let rings = (0..vcpus.max(1)).map(|_| Ring {
            queue: ArrayQueue::new(CAPACITY),
            dropped: AtomicU64::new(0),
        });
        Arc::new(Self {
            began: Instant::now(),
            rings: rings.collect(),
        })
    }

    /// Nanoseconds since the recording began.
    pub fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// What was recorded since the last call, in the order of time, and what was lost.
    pub fn drain(&self) -> Vec<Line> {
        let mut records = Vec::new();
        let mut lost = Vec::new();
        for (vcpu, ring) in (0..).zip(&self.rings) {
            let dropped = ring.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                lost.push(Line::Dropped {
                    vcpu: Some(vcpu),
                    count: dropped,
                });
            }
            // Not until it is empty: a vCPU may fill it as fast as it is read.
            for _ in 0..CAPACITY {
                let Some((time, event)) = ring.queue.pop() else {
                    break;
                };
                records.push(FaultRecord::new(time, &event));
            }
        }
        records.sort_by_key(|record| record.time_ns);
        lost.extend(records.into_iter().map(Line::Fault));
        lost
    }
}

/// A recorder as the MMU's subscriber.
pub struct RingObserver(pub Arc<Recorder>);

impl Subscriber for RingObserver {
    fn fault(&self, event: &FaultEvent) {
        let rings = &self.0.rings;
        // A vCPU that came later shares the last ring.
        let ring = &rings[(event.vcpu as usize).min(rings.len() - 1)];
        if ring.queue.push((self.0.now_ns(), *event)).is_err() {
            ring.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use addr::Gva;
    use mmu::event::Cause;
    use mmu::{Access, AccessKind, PagingPath, Privilege};

    fn event(vcpu: u32, gva: u64) -> FaultEvent {
        FaultEvent {
            vcpu,
            path: PagingPath::Nested,
            cause: Cause::NotPresent,
            access: Access::new(AccessKind::Read, Privilege::User),
            rip: 0x1000,
            gva: Gva::new(gva),
            gpa: None,
            hva: None,
            installed: None,
            nanoseconds: 5,
        }
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let recorder = Recorder::new(2);
        let observer = RingObserver(recorder.clone());
        for n in 0..CAPACITY as u64 + 7 {
            observer.fault(&event(1, n));
        }
        observer.fault(&event(0, 42));
        let lines = recorder.drain();
        assert_eq!(
            lines[0],
            Line::Dropped {
                vcpu: Some(1),
                count: 7
            }
        );
        assert_eq!(lines.len(), 1 + CAPACITY + 1);
        let Some(Line::Fault(last)) = lines.last() else {
            panic!("{lines:?}");
        };
        assert_eq!((last.vcpu, last.gva), (0, Gva::new(42)));
        assert_eq!(recorder.drain(), []);
    }
}
