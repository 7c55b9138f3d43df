//! What the fault stream costs a boot: compiled out, with nobody listening, with a listener,
//! alternating.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Boots of each kind.
const BOOTS: usize = 15;

/// One of the three kinds, and what its boots took.
struct Kind {
    what: &'static str,
    command: PathBuf,
    listener: Listener,
    times: Vec<Duration>,
    processor: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Listener {
    None,
    All,
}

impl Kind {
    fn new(what: &'static str, command: &Path, listener: Listener) -> Self {
        Self {
            what,
            command: command.to_owned(),
            listener,
            times: Vec::new(),
            processor: Duration::ZERO,
        }
    }

    fn print(&mut self, base: Option<&Kind>) {
        self.times.sort_unstable();
        let cost = |mine: Duration, its: Duration| {
            format!(
                "{:+.1} %",
                (mine.as_secs_f64() / its.as_secs_f64() - 1.0) * 100.0
            )
        };
        let (middle, mean) = (self.middle(), self.mean());
        let (wall, processor) = base.map_or_else(Default::default, |base| {
            (
                format!(" ({})", cost(middle, base.middle())),
                format!(" ({})", cost(mean, base.mean())),
            )
        });
        println!(
            "{}: {middle:.2?}{wall}; processor time {mean:.2?}{processor}",
            self.what
        );
    }

    fn middle(&self) -> Duration {
        self.times[self.times.len() / 2]
    }

    /// The kernel counts in hundredths of a second, so all boots are added up.
    fn mean(&self) -> Duration {
        self.processor / BOOTS as u32
    }
}

/// Builds the command, and once more with no code for observation; boots, and prints.
pub(crate) fn main() -> Result<()> {
    let observing = build(&target(), &[])?;
    let blind = build(&target().join("unobserved"), &["--features", "unobserved"])?;
    let mut kinds = [
        Kind::new("no code for observation ", &blind, Listener::None),
        Kind::new("nobody listens          ", &observing, Listener::None),
        Kind::new("all faults listened to  ", &observing, Listener::All),
    ];
    let mut lost = 0;
    for boot in 0..=BOOTS {
        for kind in &mut kinds {
            let seen = boot_once(&kind.command, boot, kind.listener)?;
            // The first boot of each kind warms the caches.
            if boot > 0 {
                kind.times.push(seen.elapsed);
                kind.processor += seen.processor;
                lost += seen.lost;
            }
        }
    }
    println!("a boot, medians of {BOOTS}, alternating; processor time is the mean");
    let [blind, quiet, heard] = &mut kinds;
    blind.print(None);
    quiet.print(Some(blind));
    heard.print(Some(quiet));
    println!("faults lost: {lost}");
    Ok(())
}

fn build(target: &Path, options: &[&str]) -> Result<PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "-p", "fourfold"])
        .args(options)
        .env("CARGO_TARGET_DIR", target)
        .status()?;
    ensure!(status.success(), "building fourfold: {status}");
    Ok(target.join("release/fourfold"))
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

/// What one boot took, from the guest's first instruction to its last.
struct Boot {
    elapsed: Duration,
    processor: Duration,
    lost: u64,
}

fn boot_once(command: &Path, number: usize, listener: Listener) -> Result<Boot> {
    let name = format!("fault-cost-{}-{number}", std::process::id());
    let mut guest = Command::new(command)
        .args(["run", "--accel", "user", "--paused", "--name", &name])
        .args(["--timeout", "60", "--exec", "true"])
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", command.display()))?;
    let begun = wait_until_paused(command, &name, &mut guest);
    let measured = begun.and_then(|()| measure(command, &name, &mut guest, listener));
    // Where something failed before its end.
    let _ = guest.kill();
    let _ = guest.wait();
    measured
}

fn measure(command: &Path, name: &str, guest: &mut Child, listener: Listener) -> Result<Boot> {
    let started = Instant::now();
    let ears = match listener {
        Listener::All => Some(
            Command::new(command)
                .args(["faults", name, "--resume", "--summary", "--json"])
                .stdout(Stdio::piped())
                .spawn()?,
        ),
        Listener::None => {
            run(command, &["resume", name])?;
            None
        }
    };
    let before = children_time()?;
    let status = guest.wait()?;
    let elapsed = started.elapsed();
    let processor = children_time()?.saturating_sub(before);
    ensure!(status.success(), "the guest ended with {status}");
    let lost = match ears {
        Some(listener) => lost(&listener.wait_with_output()?.stdout)?,
        None => 0,
    };
    Ok(Boot {
        elapsed,
        processor,
        lost,
    })
}

fn lost(summary: &[u8]) -> Result<u64> {
    let summary: serde_json::Value = serde_json::from_slice(summary)?;
    ensure!(summary["faults"].as_u64() > Some(0), "no fault was heard");
    Ok(summary["dropped"].as_u64().unwrap_or(0))
}

/// Processor time of the children that were waited for (`proc_pid_stat(5)`, fields 16 and 17, in
/// hundredths of a second).
fn children_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let behind_name = text.rsplit_once(')').context("/proc/self/stat")?.1;
    let fields: Vec<_> = behind_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok());
    let (user, system) = ticks(13).zip(ticks(14)).context("/proc/self/stat")?;
    Ok(Duration::from_millis((user + system) * 10))
}

fn wait_until_paused(command: &Path, name: &str, guest: &mut Child) -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline && guest.try_wait()?.is_none() {
        if run(command, &["ps"])?.contains(&format!("{name}  ")) {
            // Waits for the machine to be built.
            return run(command, &["pause", name]).map(drop);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    anyhow::bail!("{name} did not start")
}

fn run(command: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(command).args(args).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
