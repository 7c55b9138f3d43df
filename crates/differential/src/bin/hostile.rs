//! Hostile code as a command: see `cargo xtask hostile-code --help`.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

use differential::hostile::{Attack, Mode, Tally};

/// Runs random bytes and broken code in every mode: no panic, no hang, no access outside the guest
#[derive(Parser)]
#[command(bin_name = "cargo xtask hostile-code")]
struct Cli {
    /// Minutes in all, shared among the modes
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Where all draws come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the modes whose name holds this
    #[arg(long)]
    mode: Option<String>,
}

/// Time between two looks at the canaries.
const STRETCH: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let cli = Cli::parse();
    let modes = chosen(cli.mode.as_deref());
    let share = Duration::from_secs_f64(cli.minutes * 60.0) / modes.len().max(1) as u32;
    let mut all = 0;
    for (index, mode) in modes.iter().enumerate() {
        let seed = cli.seed.wrapping_mul(1000).wrapping_add(index as u64);
        let tally = run(*mode, seed, share).with_context(|| format!("{mode:?}, seed {seed}"))?;
        all += tally.runs;
        println!("{}", describe(*mode, &tally));
    }
    println!(
        "{all} guests in {} modes, {} minutes, seed {}: none broke out, none was stuck",
        modes.len(),
        cli.minutes,
        cli.seed
    );
    Ok(())
}

fn chosen(pattern: Option<&str>) -> Vec<Mode> {
    let pattern = pattern.unwrap_or_default().to_lowercase();
    let name = |mode: &Mode| format!("{mode:?}").to_lowercase();
    let mut modes = Mode::ALL.to_vec();
    modes.retain(|mode| name(mode).contains(&pattern));
    modes
}

fn run(mode: Mode, seed: u64, time: Duration) -> Result<Tally> {
    let mut attack = Attack::new(mode, seed)?;
    let started = Instant::now();
    loop {
        let left = time.saturating_sub(started.elapsed());
        let tally = attack.run(left.min(STRETCH))?;
        if left <= STRETCH {
            return Ok(tally.clone());
        }
        progress(mode, tally, left);
    }
}

fn progress(mode: Mode, tally: &Tally, left: Duration) {
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let left = left.as_secs();
        // Nobody minds where the terminal is gone.
        let _ = write!(out, "\r{mode:?}: {} guests, {left} s left   \r", tally.runs);
        let _ = out.flush();
    }
}

fn describe(mode: Mode, tally: &Tally) -> String {
    let exits: Vec<_> = tally
        .exits
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    let (runs, longest) = (tally.runs, tally.longest.as_millis());
    let mode = format!("{mode:?}");
    format!(
        "{mode:14} {runs:8} guests, the longest {longest} ms: {}",
        exits.join(", ")
    )
}
