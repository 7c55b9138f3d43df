//! What the fault stream costs a boot: with a listener and without, alternating.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Boots of each kind.
const BOOTS: usize = 9;

/// Builds the command, boots, and prints the medians.
pub(crate) fn main() -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "-p", "fourfold"])
        .status()?;
    ensure!(status.success(), "building fourfold: {status}");
    let command = target().join("release/fourfold");
    let (mut alone, mut heard) = (Vec::new(), Vec::new());
    let mut lost = 0;
    for boot in 0..=BOOTS {
        let quiet = boot_once(&command, boot, None)?;
        let mut dropped = 0;
        let loud = boot_once(&command, boot, Some(&mut dropped))?;
        // The first boot of each kind warms the caches.
        if boot > 0 {
            alone.push(quiet);
            heard.push(loud);
            lost += dropped;
        }
    }
    let (alone, heard) = (median(&mut alone), median(&mut heard));
    let cost = (heard.as_secs_f64() / alone.as_secs_f64() - 1.0) * 100.0;
    println!("boot, nobody listens: {alone:.2?}");
    println!("boot, all faults listened to from the first instruction: {heard:.2?} ({cost:+.1} %)");
    println!("faults lost: {lost}");
    Ok(())
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from)
}

/// From the guest's first instruction to its last.
fn boot_once(command: &Path, number: usize, lost: Option<&mut u64>) -> Result<Duration> {
    let name = format!("fault-cost-{}-{number}", std::process::id());
    let mut guest = Command::new(command)
        .args(["run", "--accel", "user", "--paused", "--name", &name])
        .args(["--timeout", "60", "--exec", "true"])
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", command.display()))?;
    let begun = wait_until_paused(command, &name, &mut guest);
    let measured = begun.and_then(|()| {
        let started = Instant::now();
        let listener = lost.is_some().then(|| {
            Command::new(command)
                .args(["faults", &name, "--resume", "--summary", "--json"])
                .stdout(Stdio::piped())
                .spawn()
        });
        if listener.is_none() {
            run(command, &["resume", &name])?;
        }
        let status = guest.wait()?;
        let elapsed = started.elapsed();
        ensure!(status.success(), "the guest ended with {status}");
        if let (Some(listener), Some(lost)) = (listener, lost) {
            let output = listener?.wait_with_output()?;
            let summary: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            ensure!(summary["faults"].as_u64() > Some(0), "no fault was heard");
            *lost = summary["dropped"].as_u64().unwrap_or(0);
        }
        Ok(elapsed)
    });
    // Where something failed before its end.
    let _ = guest.kill();
    let _ = guest.wait();
    measured
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

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
