//! One side of the comparison: how it is started, and what it takes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::guest::Guest;
use super::{Options, Part};
use crate::workspace;

/// What a workload took.
#[derive(Clone, Debug)]
pub(super) struct Time {
    pub(super) name: String,
    /// How many times the thing was done.
    pub(super) count: u32,
    pub(super) seconds: f64,
}

/// Rows of every run: processor time, and time on the clock on the wall.
pub(super) const FIRST_PROCESS: [&str; 2] = ["first process", "first process, wall"];
/// The same until the emulator has ended.
pub(super) const POWER_OFF: [&str; 2] = ["power-off", "power-off, wall"];

/// Those of one run, in order.
pub(super) type Times = Vec<Time>;

/// A command that boots the guest and ends when it powers off.
pub(super) struct Side {
    name: &'static str,
    program: String,
    arguments: Vec<String>,
}

impl Side {
    /// Our own, built with optimisation.
    pub(super) fn ours(options: &Options, guest: &Guest) -> Result<Self> {
        let program = if let Some(program) = &options.fourfold {
            text(program)
        } else {
            let built = Command::new(env!("CARGO"))
                .args(["build", "--release", "--quiet", "--package", "fourfold"])
                .status()
                .context("can't start cargo")?;
            ensure!(built.success(), "building fourfold failed: {built}");
            text(&workspace::target_directory()?.join("release/fourfold"))
        };
        let (memory, cpus) = (format!("{}M", options.memory), options.cpus.to_string());
        let arguments = [
            "run",
            "--accel",
            "user",
            "--paging",
            &options.paging,
            "--kernel",
            &text(&guest.kernel),
            "--initrd",
            &text(&guest.initrd),
            "--append",
            &guest.command_line,
            "--memory",
            &memory,
            "--cpus",
            &cpus,
        ];
        Ok(Self {
            name: "fourfold",
            program,
            arguments: arguments.map(str::to_owned).to_vec(),
        })
    }

    /// QEMU's, with the machine that it gives by default and nothing that isn't needed.
    pub(super) fn qemu(options: &Options, guest: &Guest) -> Self {
        let (memory, cpus) = (options.memory.to_string(), options.cpus.to_string());
        let arguments = [
            "-accel",
            "tcg",
            "-cpu",
            &options.qemu_cpu,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
            "-kernel",
            &text(&guest.kernel),
            "-initrd",
            &text(&guest.initrd),
            "-append",
            &guest.command_line,
            "-m",
            &memory,
            "-smp",
            &cpus,
        ];
        Self {
            name: "QEMU's TCG",
            program: "qemu-system-x86_64".to_owned(),
            arguments: arguments.map(str::to_owned).to_vec(),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Boots once, to the guest's end.
    pub(super) fn run(&self, part: Part) -> Result<Times> {
        let arguments = self.arguments.iter().map(|text| part.fill_in(text));
        let began = Instant::now();
        let before = processor_time_of_children();
        let mut child = Command::new(&self.program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("can't start {}", self.program))?;
        let times = watch(&mut child, began);
        if times.is_err() {
            let _ = child.kill();
        }
        let status = child.wait()?;
        let mut times = times.with_context(|| format!("{} ({status})", self.name))?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        if part == Part::Boot {
            let used = processor_time_of_children() - before;
            times.push(time(POWER_OFF[0], 1, used));
            times.push(time(POWER_OFF[1], 1, began.elapsed().as_secs_f64()));
        }
        Ok(times)
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Reads the console to its end.
fn watch(child: &mut Child, started: Instant) -> Result<Times> {
    let console = child.stdout.take().context("no console")?;
    let process = child.id();
    let mut times = Times::new();
    let mut begun = 0.0;
    let mut last = 0.0;
    let mut lines = Vec::new();
    for line in BufReader::new(console).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        // Gone once the emulator has ended: then the last figure is the best.
        last = processor_time(process).unwrap_or(last);
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("begin"), Some(_)) => {
                if times.is_empty() {
                    times.push(time(FIRST_PROCESS[0], 1, last));
                    let wall = started.elapsed().as_secs_f64();
                    times.push(time(FIRST_PROCESS[1], 1, wall));
                }
                begun = last;
            }
            (Some("end"), Some(name)) => {
                let count = words.next().and_then(|n| n.parse().ok()).unwrap_or(1);
                times.push(time(name, count, last - begun));
            }
            _ => {}
        }
        lines.push(line);
    }
    ensure!(last > 0.0, "nothing on the console");
    Ok(times)
}

fn time(name: &str, count: u32, seconds: f64) -> Time {
    Time {
        name: name.to_owned(),
        count,
        seconds,
    }
}

/// What all threads of a process have used up (`proc_pid_schedstat(5)`: nanoseconds first).
fn processor_time(process: u32) -> Option<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))
        .ok()?
        .flatten()
    {
        let statistics = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        nanoseconds += statistics.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    (nanoseconds > 0).then_some(Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// What all children that have ended have used up (`proc_pid_stat(5)`, fields 16 and 17).
fn processor_time_of_children() -> f64 {
    const TICKS: f64 = 100.0;
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field may hold anything, but ends with the last parenthesis.
    let fields = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(13).take(2);
    ticks
        .filter_map(|text| text.parse::<f64>().ok())
        .sum::<f64>()
        / TICKS
}
