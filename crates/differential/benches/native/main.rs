//! The same machine code natively and translated, in one run: what share of native speed is left.
//!
//! `cargo bench -p differential --bench native`; `-- --enforce` fails where a bar is missed,
//! `-- NAME` runs the kernels whose name or group holds NAME.

mod fresh;
mod kernels;
mod machine;

use std::time::Duration;

use addr::Gpa;
use anyhow::{Result, ensure};
use differential::guest::thread_time::thread_time;

use kernels::{Data, Kernel};
use machine::{BUFFER, CODE, Guest};

/// Alternating runs of each kernel on each side.
const RUNS: usize = 11;
/// How long one native run takes.
const RUN_TIME: Duration = Duration::from_millis(12);
/// Nanoseconds for an instruction of fresh code.
const FRESH_BAR: f64 = 150.0;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let enforce = arguments.iter().any(|argument| argument == "--enforce");
    let pattern = arguments
        .iter()
        .find(|argument| !argument.starts_with("--"));
    let wanted = |kernel: &Kernel| {
        pattern
            .is_none_or(|p| kernel.name.contains(p.as_str()) || kernel.group.contains(p.as_str()))
    };
    let mut guest = Guest::new()?;
    println!(
        "{:20} {:18} {:>10} {:>10} {:>7} {:>6}",
        "kernel", "group", "native ns", "guest ns", "ratio", "bar"
    );
    let mut missed = Vec::new();
    for kernel in kernels::all().iter().filter(|kernel| wanted(kernel)) {
        let result = compare(&mut guest, kernel)?;
        result.print(kernel);
        if result.ratio() < kernel.bar {
            missed.push(kernel.name);
        }
    }
    if pattern.is_none_or(|p| "fresh".contains(p.as_str())) && !fresh_code(&mut guest)? {
        missed.push("fresh code");
    }
    println!(
        "below the bar: {}",
        if missed.is_empty() {
            "none".into()
        } else {
            missed.join(", ")
        }
    );
    ensure!(
        missed.is_empty() || !enforce,
        "below the bar: {}",
        missed.join(", ")
    );
    Ok(())
}

/// Medians, in nanoseconds for one round.
struct Medians {
    native: f64,
    guest: f64,
}

impl Medians {
    fn ratio(&self) -> f64 {
        self.native / self.guest
    }

    fn print(&self, kernel: &Kernel) {
        let mark = if self.ratio() < kernel.bar {
            "  MISSED"
        } else {
            ""
        };
        println!(
            "{:20} {:18} {:10.2} {:10.2} {:7.2} {:6.2}{mark}",
            kernel.name,
            kernel.group,
            self.native,
            self.guest,
            self.ratio(),
            kernel.bar
        );
    }
}

fn compare(guest: &mut Guest, kernel: &Kernel) -> Result<Medians> {
    prepare(guest, kernel);
    let buffer = (guest.machine.hva().raw() + BUFFER) as *mut u8;
    let rounds = calibrate(|rounds| (kernel.entry)(buffer, rounds));
    guest.call(CODE, BUFFER, rounds.min(1000).into())?;
    let (mut native, mut translated) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (expected, time) = timed(|| (kernel.entry)(buffer, rounds.into()));
        native.push(time);
        let (found, time) = timed(|| guest.call(CODE, BUFFER, rounds.into()));
        translated.push(time);
        ensure!(
            expected == found?,
            "{} computes something else in the guest",
            kernel.name
        );
    }
    Ok(Medians {
        native: median(&mut native) / f64::from(rounds),
        guest: median(&mut translated) / f64::from(rounds),
    })
}

/// Code and data where the guest finds them.
fn prepare(guest: &Guest, kernel: &Kernel) {
    guest.machine.write(Gpa::new(CODE), kernel.code);
    match kernel.data {
        Data::Plain => guest.machine.write(Gpa::new(BUFFER), &vec![0x5a; 64 << 10]),
        Data::Ring(bytes) => {
            for (at, next) in ring(bytes) {
                guest
                    .machine
                    .write(Gpa::new(BUFFER + at), &next.to_le_bytes());
            }
        }
    }
}

/// Offsets of cache lines, each with the one that follows it.
fn ring(bytes: usize) -> Vec<(u64, u64)> {
    let mut lines: Vec<_> = (0..bytes as u64 / 64).map(|line| line * 64).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut lines[1..]);
    let next = lines.iter().cycle().skip(1).copied();
    lines.iter().copied().zip(next).collect()
}

/// As many rounds as take [`RUN_TIME`].
fn calibrate(run: impl Fn(u64) -> u64) -> u32 {
    let mut rounds = 1;
    loop {
        let (_, time) = timed(|| run(rounds.into()));
        if time > RUN_TIME.as_secs_f64() * 1e9 {
            return rounds;
        }
        rounds *= 2;
    }
}

/// Runs code that was never seen before; whether it is quick enough.
fn fresh_code(guest: &mut Guest) -> Result<bool> {
    let mut times = Vec::new();
    let mut instructions = 0;
    for run in 0..RUNS as u64 {
        let at = CODE + 0x10_0000 * (run + 1);
        let (code, count) = fresh::code(at, 50_000)?;
        guest.machine.write(Gpa::new(at), &code);
        let (result, time) = timed(|| guest.call(at, BUFFER, 0));
        result?;
        times.push(time / f64::from(count as u32));
        instructions = count;
    }
    let time = median(&mut times);
    let mark = if time > FRESH_BAR { "  MISSED" } else { "" };
    println!(
        "fresh code, {instructions} instructions: {time:.0} ns each, at most {FRESH_BAR:.0}{mark}"
    );
    Ok(time <= FRESH_BAR)
}

/// Nanoseconds of this thread's CPU time: others on the machine take none of it.
fn timed<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let started = cpu_time();
    let result = run();
    (result, cpu_time() - started)
}

fn cpu_time() -> f64 {
    thread_time().as_secs_f64() * 1e9
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
