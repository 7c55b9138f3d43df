//! `fourfold faults`: the faults of a machine's memory, as they happen, summed up, traced.

use std::{
    fmt::Write as _,
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;
use control::{Client, Status, Wish};
use explain::{
    faults::{Counting, FaultFilter, FaultRecord, Line, Trace},
    symbols::Symbols,
};

use super::{Which, machine, names, print_json, say};
use crate::ending::Ending;

const EXAMPLES: &str = "\
Causes:
  not_present      nothing was installed for the page yet: the lazy MMU at work
  write_protected  the page was there, but writes to it had to be noticed
  guest            the guest's own page fault
  mmio             device memory
  spurious         another vCPU was faster
  tlb_fill         the TLB was filled (--paging direct has nothing else)
  read_only, host  a write to read-only memory; a guest table without memory of the host

Examples:
  fourfold faults vm                              until Ctrl-C, then sums
  fourfold faults vm --cause guest --for 5
  fourfold faults vm --summary --for 10 --symbols kernel
  fourfold faults vm --for 3 --perfetto trace.json
  fourfold faults --pid 1234                      a program under `fourfold exec`
  fourfold run --name vm --paused & fourfold faults vm --resume     from the first instruction";

/// Options of `faults`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct FaultsOptions {
    #[command(flatten)]
    which: Which,
    /// These causes alone, separated by commas
    #[arg(long, value_name = "CAUSES")]
    cause: Option<String>,
    /// This vCPU alone
    #[arg(long, value_name = "N")]
    vcpu: Option<u32>,
    /// This region of guest physical memory alone, as `fourfold map` names it
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// Those that took at least so many nanoseconds
    #[arg(long, value_name = "NS")]
    min_ns: Option<u64>,
    /// Stop after so many seconds
    #[arg(long = "for", value_name = "SECONDS")]
    duration: Option<f64>,
    /// Stop after so many faults
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Show the sums alone
    #[arg(long)]
    summary: bool,
    /// Write a trace that ui.perfetto.dev opens to this file
    #[arg(long, value_name = "FILE")]
    perfetto: Option<PathBuf>,
    /// Name functions by this System.map, vmlinux or kernel image; `kernel` stands for the kernel
    /// that the machine booted
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Let a paused machine go on once the listening has begun
    #[arg(long)]
    resume: bool,
    /// Print lines and sums as JSON: the API's `Line` and `Summary`
    #[arg(long)]
    json: bool,
}

/// Listens and shows.
pub(crate) fn run(options: &FaultsOptions) -> Result<Ending> {
    let client = machine(&options.which.name()?)?;
    let status: Status = client.get("/status", &())?;
    let symbols = match &options.symbols {
        Some(path) => Some(names::symbols(&client, Some(path))?),
        None => None,
    };
    let trace = match &options.perfetto {
        Some(path) => {
            let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
            let trace = Trace::begin(BufWriter::new(file), status.pid, &status.name)?;
            Some(trace)
        }
        None => None,
    };
    catch_interrupt();
    let mut listener = Listener {
        options,
        symbols: symbols.as_ref(),
        trace,
        counting: Counting::default(),
        faults: 0,
        began: Instant::now(),
        resumed: !options.resume,
        failure: None,
    };
    listener.listen(&client)?;
    listener.finish()
}

struct Listener<'a> {
    options: &'a FaultsOptions,
    symbols: Option<&'a Symbols>,
    trace: Option<Trace<BufWriter<File>>>,
    counting: Counting,
    faults: u64,
    began: Instant,
    /// Nothing is left to be resumed.
    resumed: bool,
    failure: Option<anyhow::Error>,
}

impl Listener<'_> {
    fn listen(&mut self, client: &Client) -> Result<()> {
        let filter = FaultFilter {
            cause: self.options.cause.clone(),
            vcpu: self.options.vcpu,
            region: self.options.region.clone(),
            min_ns: self.options.min_ns,
        };
        client.lines("/faults", &filter, |text| match self.see(text) {
            Ok(wish) => wish,
            Err(error) => {
                self.failure = Some(error);
                Wish::Enough
            }
        })?;
        self.failure.take().map_or(Ok(()), Err)
    }

    fn see(&mut self, text: &str) -> Result<Wish> {
        let line: Line = serde_json::from_str(text).context("a line of the stream")?;
        if !self.resumed {
            self.resumed = true;
            super::power::go_on(&self.options.which.name()?)?;
        }
        self.counting.add(&line, self.symbols);
        if let Some(trace) = &mut self.trace {
            trace
                .add(&line, self.symbols)
                .context("writing the trace")?;
        }
        if !self.options.summary {
            self.show(text, &line)?;
        }
        if matches!(line, Line::Fault(_)) {
            self.faults += 1;
        }
        let enough = INTERRUPTED.load(Ordering::Relaxed)
            || self.options.count.is_some_and(|most| self.faults >= most)
            || self
                .options
                .duration
                .is_some_and(|most| self.began.elapsed() >= seconds(most));
        Ok(if enough { Wish::Enough } else { Wish::More })
    }

    fn show(&self, text: &str, line: &Line) -> Result<()> {
        match line {
            Line::Idle { .. } => Ok(()),
            _ if self.options.json => say(&format!("{text}\n")),
            Line::Fault(record) => say(&shown(record, self.symbols)),
            Line::Dropped { count, .. } => say(&format!("      ... {count} faults lost ...\n")),
        }
    }

    fn finish(self) -> Result<Ending> {
        if let Some(trace) = self.trace {
            trace.finish().context("writing the trace")?;
        }
        let summary = self.counting.finish();
        if self.options.json {
            if self.options.summary {
                print_json(&summary)?;
            }
        } else if self.options.summary {
            say(&summary.to_string())?;
        } else {
            // After the lines of a stream on standard output.
            write!(std::io::stderr(), "\n{summary}").context("writing the sums")?;
        }
        Ok(Ending::Done)
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "shown with six digits")]
fn in_seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// One line of text.
fn shown(record: &FaultRecord, symbols: Option<&Symbols>) -> String {
    let mut text = format!(
        "{:>12.6} vcpu {} {:<15} {:<16} rip {:#x}",
        in_seconds(record.time_ns),
        record.vcpu,
        record.cause,
        record.access,
        record.rip
    );
    if let Some((name, offset)) = symbols.and_then(|symbols| symbols.find(record.rip)) {
        let _ = write!(text, " {name}+{offset:#x}");
    }
    let _ = write!(text, " gva {:#x}", record.gva);
    if let Some(code) = record.error_code {
        let _ = write!(text, " error {code:#x}");
    }
    if let Some(gpa) = record.gpa {
        let _ = write!(text, " gpa {gpa:#x}");
    }
    if let Some(region) = &record.region {
        let _ = write!(text, " {region}");
    }
    if let Some(slot) = record.slot {
        let _ = write!(text, " (slot {slot})");
    }
    if let Some(hva) = record.hva {
        let _ = write!(text, " hva {hva:#x}");
    }
    if let Some(installed) = &record.installed {
        let writable = if installed.writable { " writable" } else { "" };
        let _ = write!(text, " +{} KiB{writable}", installed.bytes >> 10);
    }
    let _ = writeln!(text, " {} ns", record.cost_ns);
    text
}

/// Ctrl-C ends the listening, not the sums.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[expect(unsafe_code, reason = "signal handlers are libc's")]
fn catch_interrupt() {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = note;
    // SAFETY: the handler stores to an atomic and does nothing else. The stream says something
    // every second, so that it is noticed.
    unsafe { libc::signal(libc::SIGINT, handler as *const () as libc::sighandler_t) };
}
