//! A trace that Perfetto's user interface opens: the JSON trace event format, one slice a fault, one
//! track a vCPU.
//!
//! Threads are numbered from 1: to the reader of the format, thread 0 is the idle one.

use std::io::{self, Write};

use serde_json::json;

use super::record::{FaultRecord, Line};
use crate::symbols::Symbols;

/// Writes a trace, event by event. A trace that is not finished opens, too: the format allows the
/// closing bracket to be missing.
pub struct Trace<W: Write> {
    out: W,
    pid: u32,
    vcpus: Vec<u32>,
    /// When the last line was, for those that have no time of their own.
    last_ns: u64,
}

impl<W: Write> Trace<W> {
    /// Begins the trace of a machine.
    pub fn begin(mut out: W, pid: u32, machine: &str) -> io::Result<Self> {
        writeln!(out, "[")?;
        let name = json!({
            "name": "process_name", "ph": "M", "pid": pid,
            "args": { "name": format!("fourfold {machine}") },
        });
        write!(out, "{name}")?;
        Ok(Self {
            out,
            pid,
            vcpus: Vec::new(),
            last_ns: 0,
        })
    }

    /// One line of the stream.
    pub fn add(&mut self, line: &Line, symbols: Option<&Symbols>) -> io::Result<()> {
        match line {
            Line::Fault(record) => self.fault(record, symbols),
            Line::Dropped { vcpu, count } => {
                let lost = json!({
                    "name": format!("{count} faults lost"), "cat": "fault",
                    "ph": "i", "s": if vcpu.is_some() { "t" } else { "p" },
                    "ts": microseconds(self.last_ns),
                    "pid": self.pid, "tid": thread(vcpu.unwrap_or(0)),
                });
                write!(self.out, ",\n{lost}")
            }
            Line::Idle { time_ns } => {
                self.last_ns = *time_ns;
                Ok(())
            }
        }
    }

    fn fault(&mut self, record: &FaultRecord, symbols: Option<&Symbols>) -> io::Result<()> {
        if !self.vcpus.contains(&record.vcpu) {
            self.vcpus.push(record.vcpu);
            let name = json!({
                "name": "thread_name", "ph": "M", "pid": self.pid,
                "tid": thread(record.vcpu),
                "args": { "name": format!("vCPU {}", record.vcpu) },
            });
            write!(self.out, ",\n{name}")?;
        }
        let mut arguments = serde_json::to_value(record)?;
        if let Some((function, offset)) = symbols.and_then(|s| s.find(record.rip)) {
            arguments["function"] = json!(format!("{function}+{offset:#x}"));
        }
        self.last_ns = record.time_ns;
        let began = record.time_ns.saturating_sub(record.cost_ns);
        let event = json!({
            "name": record.cause, "cat": "fault", "ph": "X",
            "ts": microseconds(began), "dur": microseconds(record.cost_ns),
            "pid": self.pid, "tid": thread(record.vcpu), "args": arguments,
        });
        write!(self.out, ",\n{event}")
    }

    /// Ends it.
    pub fn finish(mut self) -> io::Result<()> {
        writeln!(self.out, "\n]")?;
        self.out.flush()
    }
}

/// A vCPU's number as a thread.
fn thread(vcpu: u32) -> u32 {
    vcpu + 1
}

/// The format's unit; a trace is shorter than the 104 days that are exact.
#[expect(clippy::cast_precision_loss, reason = "exact for 104 days")]
fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}
