//! The differential test as a command: see `cargo xtask differential --help`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;

use differential::campaign::{self, Effort, MODES, Progress, Tally};
use differential::case::{Executor, Mode};
use differential::generate::Catalogue;
use differential::guest::{GuestCpu, Translation};
use differential::minimise::Pair;
use differential::native::NativeCpu;

/// Runs every form of instruction natively and translated, and compares bit for bit
#[derive(Parser)]
#[command(bin_name = "cargo xtask differential")]
struct Cli {
    /// Only forms whose name (as iced-x86 has it) holds this
    #[arg(long)]
    forms: Option<String>,
    /// Encodings drawn of each form in each round
    #[arg(long, default_value_t = 4)]
    encodings: usize,
    /// States drawn for each encoding
    #[arg(long, default_value_t = 16)]
    states: usize,
    /// Where all draws come from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Go on for so many minutes
    #[arg(long, default_value_t = 0.0)]
    minutes: f64,
    /// Print so many divergences
    #[arg(long, default_value_t = 10)]
    kept: usize,
    /// Compare the physical CPU with itself: what differs can't be tested this way
    #[arg(long)]
    native_twice: bool,
    /// Only whole programs, not single instructions
    #[arg(long)]
    blocks: bool,
    /// Only single instructions, not whole programs
    #[arg(long, conflicts_with = "blocks")]
    singles: bool,
    /// Print divergences as soon as they are found, to standard error
    #[arg(long)]
    progress: bool,
    /// Name every form that is left out
    #[arg(long)]
    list_excluded: bool,
}

/// Modes times translations times kinds of programs: what the time is shared among.
const RUNS: f64 = 15.0;

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let effort = Effort {
        seed: cli.seed,
        encodings: cli.encodings,
        states: cli.states,
        time: Duration::from_secs_f64(cli.minutes * 60.0 / RUNS),
        kept: cli.kept,
        progress: if cli.progress {
            Progress::Shown
        } else {
            Progress::Quiet
        },
    };
    let mut native = NativeCpu::new()?;
    let mut clean = true;
    for mode in MODES {
        for translation in [Translation::Exact, Translation::Fast, Translation::Stepped] {
            clean &= run(&cli, mode, translation, &mut native, effort)?;
        }
    }
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run(
    cli: &Cli,
    mode: Mode,
    translation: Translation,
    native: &mut NativeCpu,
    effort: Effort,
) -> Result<bool> {
    let mut catalogue = Catalogue::new(mode);
    if let Some(pattern) = &cli.forms {
        catalogue.restrict(pattern);
    }
    let mut subject = subject(cli, translation)?;
    let mut pair = Pair {
        native,
        subject: &mut *subject,
    };
    let mut clean = true;
    if !cli.blocks && translation != Translation::Stepped {
        let started = Instant::now();
        let tally = campaign::single_instructions(&mut catalogue, effort, &mut pair)?;
        print_title(cli, mode, "single instructions", &pair);
        print_catalogue(&catalogue, cli);
        clean &= print_tally(&tally, started.elapsed());
    }
    if !cli.singles {
        let started = Instant::now();
        let tally = campaign::blocks(&catalogue, mode, effort, &mut pair)?;
        print_title(cli, mode, "whole programs", &pair);
        clean &= print_tally(&tally, started.elapsed());
    }
    Ok(clean)
}

fn print_title(cli: &Cli, mode: Mode, what: &str, pair: &Pair<'_>) {
    println!(
        "{mode:?}, {what}, {}, seed {}",
        pair.subject.name(),
        cli.seed
    );
}

fn subject(cli: &Cli, translation: Translation) -> Result<Box<dyn Executor>> {
    Ok(if cli.native_twice {
        Box::new(NativeCpu::new()?)
    } else {
        Box::new(GuestCpu::new(translation)?)
    })
}

fn print_catalogue(catalogue: &Catalogue, cli: &Cli) {
    println!("  forms covered: {}", catalogue.forms.len());
    for (exclusion, codes) in &catalogue.excluded {
        println!("  left out {:5}: {}", codes.len(), exclusion.reason());
        if cli.list_excluded {
            println!("      {codes:?}");
        }
    }
}

fn print_tally(tally: &Tally, time: Duration) -> bool {
    println!(
        "  cases: {} in {} rounds, {:.1} s; without an end on the host: {:?}",
        tally.cases,
        tally.rounds,
        time.as_secs_f64(),
        tally.incomparable
    );
    let endings: Vec<_> = tally
        .endings
        .iter()
        .map(|(v, n)| format!("{v}: {n}"))
        .collect();
    println!("  ended by vector: {}", endings.join(", "));
    for divergence in &tally.divergences {
        println!("{divergence}");
    }
    let count: u64 = tally.diverging.values().sum();
    println!("  divergences: {count} in {} forms", tally.diverging.len());
    for (name, count) in &tally.diverging {
        println!("    {count:6} {name}");
    }
    tally.diverging.is_empty()
}
