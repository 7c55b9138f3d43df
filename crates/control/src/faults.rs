//! The stream of faults: one recorder for all who listen, none where nobody does.
//!
//! ```text
//!   vCPU threads ─ rings ─► pump thread, every 5 ms ─ batches ─┬─► listener: filter, JSON, socket
//!                                                              └─► listener
//! ```
//!
//! Whoever reads too slowly loses batches, and is told how many faults were in them.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use explain::{
    SlotRange,
    faults::{FaultFilter, FaultRecord, Line, Recorder, RingObserver},
    parse_hex,
};
use http_body_util::channel::{Channel, Sender};
use mmu::Mmu;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::{
    api::RegionSide,
    machine::{Machine, Trouble},
};

/// How often rings are drained. A ring holds what a vCPU can do in that time many times over.
const PERIOD: Duration = Duration::from_millis(5);
/// After so long without a fault the stream says that it lives.
const IDLE: Duration = Duration::from_secs(1);
/// Batches that a listener may be behind.
const BATCHES: usize = 256;

/// Everybody who listens to one machine.
#[derive(Default)]
pub(crate) struct Hub {
    feed: Mutex<Weak<Feed>>,
}

/// Faults of one machine, for as long as anybody listens.
struct Feed {
    recorder: Arc<Recorder>,
    batches: broadcast::Sender<Arc<Batch>>,
    ended: AtomicBool,
}

struct Batch {
    /// How many lines were sent before.
    before: u64,
    lines: Vec<Line>,
}

impl Hub {
    /// A body of lines, one JSON object each, until the client goes or the machine ends.
    pub(crate) fn listen(
        self: &Arc<Self>,
        machine: &Arc<dyn Machine>,
        filter: FaultFilter,
    ) -> Result<Body, Trouble> {
        if let Some(wrong) = filter.unknown_cause() {
            return Err(Trouble::Question(wrong));
        }
        let (feed, batches) = self.join(machine)?;
        let (sender, body) = Channel::new(16);
        tokio::spawn(serve(feed, batches, filter, sender));
        Ok(Body::new(body))
    }

    fn join(
        self: &Arc<Self>,
        machine: &Arc<dyn Machine>,
    ) -> Result<(Arc<Feed>, broadcast::Receiver<Arc<Batch>>), Trouble> {
        let mut current = self.feed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(feed) = current.upgrade().filter(|feed| !feed.has_ended()) {
            let batches = feed.batches.subscribe();
            return Ok((feed, batches));
        }
        let Some(mmu) = machine.mmu()? else {
            let why = "the kernel's KVM tells its faults to its tracepoints alone: see \
                       `perf trace -e kvmmmu:*`";
            return Err(Trouble::Unsupported(why.to_owned()));
        };
        let recorder = Recorder::new(machine.status().cpus as usize);
        let (sender, batches) = broadcast::channel(BATCHES);
        let feed = Arc::new(Feed {
            recorder: recorder.clone(),
            batches: sender,
            ended: AtomicBool::new(false),
        });
        *current = Arc::downgrade(&feed);
        let pump = Pump {
            hub: self.clone(),
            feed: Arc::downgrade(&feed),
            mmu: Arc::downgrade(&mmu),
            machine: machine.clone(),
        };
        let started = thread::Builder::new()
            .name("faults".to_owned())
            .spawn(move || pump.run());
        started.map_err(|error| Trouble::Unsupported(format!("no thread for it: {error}")))?;
        mmu.set_subscriber(Some(Box::new(RingObserver(recorder))));
        Ok((feed, batches))
    }
}

impl Feed {
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// From rings to batches.
struct Pump {
    hub: Arc<Hub>,
    feed: Weak<Feed>,
    mmu: Weak<Mmu>,
    machine: Arc<dyn Machine>,
}

impl Pump {
    fn run(self) {
        const LOOK_AGAIN: Duration = Duration::from_secs(1);
        let mut sent = 0;
        let mut places = Places::of(&*self.machine);
        let mut looked = Instant::now();
        while let Some(feed) = self.feed.upgrade() {
            if self.mmu.strong_count() == 0 || self.machine.mmu().is_err() {
                feed.ended.store(true, Ordering::Release);
                return;
            }
            if looked.elapsed() > LOOK_AGAIN {
                places = Places::of(&*self.machine);
                looked = Instant::now();
            }
            let mut lines = feed.recorder.drain();
            if !lines.is_empty() {
                for line in &mut lines {
                    places.note(line);
                }
                let before = sent;
                sent += lines.len() as u64;
                // Nobody listens at this moment, and nobody will.
                let _ = feed.batches.send(Arc::new(Batch { before, lines }));
            }
            drop(feed);
            thread::sleep(PERIOD);
        }
        let current = self.hub.feed.lock().unwrap_or_else(PoisonError::into_inner);
        if current.upgrade().is_none()
            && let Some(mmu) = self.mmu.upgrade()
        {
            mmu.set_subscriber(None);
        }
    }
}

/// What lies where, to be told with each fault.
struct Places {
    slots: Vec<SlotRange>,
    regions: Vec<(u64, RegionSide)>,
}

impl Places {
    fn of(machine: &dyn Machine) -> Self {
        let regions = machine.regions().unwrap_or_default().into_iter();
        Self {
            slots: machine.slots().unwrap_or_default(),
            regions: regions
                .filter_map(|region| Some((parse_hex(&region.gpa)?, region)))
                .collect(),
        }
    }

    fn note(&self, line: &mut Line) {
        if let Line::Fault(FaultRecord {
            gpa: Some(gpa),
            slot,
            region,
            ..
        }) = line
        {
            let holding = self.slots.iter().find(|s| s.offset_of(*gpa).is_some());
            *slot = holding.map(|s| s.slot);
            let place = self.regions.iter().rev().find(|(start, region)| {
                gpa.raw()
                    .checked_sub(*start)
                    .is_some_and(|offset| offset < region.bytes)
            });
            *region = place.map(|(_, region)| region.name.clone());
        }
    }
}

/// From batches to one listener.
async fn serve(
    feed: Arc<Feed>,
    mut batches: broadcast::Receiver<Arc<Batch>>,
    filter: FaultFilter,
    mut to: Sender<Bytes>,
) {
    let mut next: Option<u64> = None;
    // The first line says that the stream has begun.
    if send(&mut to, &[idle(&feed)]).await.is_err() {
        return;
    }
    loop {
        let lines = match tokio::time::timeout(IDLE, batches.recv()).await {
            Err(_) if feed.has_ended() => return,
            Err(_) => vec![idle(&feed)],
            Ok(Err(RecvError::Closed)) => return,
            // The next batch shows how much is missing.
            Ok(Err(RecvError::Lagged(_))) => continue,
            Ok(Ok(batch)) => {
                let missing = next.map_or(0, |next| batch.before.saturating_sub(next));
                next = Some(batch.before + batch.lines.len() as u64);
                wanted(&batch, missing, &filter)
            }
        };
        if !lines.is_empty() && send(&mut to, &lines).await.is_err() {
            return;
        }
    }
}

fn idle(feed: &Feed) -> Line {
    Line::Idle {
        time_ns: feed.recorder.now_ns(),
    }
}

fn wanted(batch: &Batch, missing: u64, filter: &FaultFilter) -> Vec<Line> {
    let lost = (missing > 0).then_some(Line::Dropped {
        vcpu: None,
        count: missing,
    });
    let lines = batch.lines.iter().filter(|line| match line {
        Line::Fault(record) => filter.wants(record),
        Line::Dropped { .. } | Line::Idle { .. } => true,
    });
    lost.into_iter().chain(lines.cloned()).collect()
}

/// Sends; an error is a client that has gone.
async fn send(to: &mut Sender<Bytes>, lines: &[Line]) -> Result<(), ()> {
    let mut text = Vec::with_capacity(lines.len() * 256);
    for line in lines {
        serde_json::to_writer(&mut text, line).map_err(drop)?;
        text.push(b'\n');
    }
    to.send_data(text.into()).await.map_err(drop)
}
