//! The differential test as a command: see `cargo xtask differential --help`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;

use differential::campaign::{self, Effort, MODES, Progress, Tally};
use differential::case::Executor;
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

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let effort = Effort {
        seed: cli.seed,
        encodings: cli.encodings,
        states: cli.states,
        time: Duration::from_secs_f64(cli.minutes * 30.0),
        kept: cli.kept,
        progress: if cli.progress {
            Progress::Shown
        } else {
            Progress::Quiet
        },
    };
    let mut native = NativeCpu::new()?;
    let mut subject = self::subject(&cli, Translation::Normal)?;
    let mut stepped = self::subject(&cli, Translation::Stepped)?;
    let mut clean = true;
    for mode in MODES {
        let mut catalogue = Catalogue::new(mode);
        if let Some(pattern) = &cli.forms {
            catalogue.restrict(pattern);
        }
        let mut pair = Pair {
            native: &mut native,
            subject: &mut *subject,
        };
        if !cli.blocks {
            let started = Instant::now();
            let tally = campaign::single_instructions(&mut catalogue, effort, &mut pair)?;
            println!("{mode:?}, single instructions, seed {}", cli.seed);
            print_catalogue(&catalogue, &cli);
            clean &= print_tally(&tally, started.elapsed());
        }
        if !cli.singles {
            for subject in [&mut subject, &mut stepped] {
                let mut pair = Pair {
                    native: &mut native,
                    subject: &mut **subject,
                };
                let started = Instant::now();
                let tally = campaign::blocks(&catalogue, mode, effort, &mut pair)?;
                println!(
                    "{mode:?}, whole programs, {}, seed {}",
                    pair.subject.name(),
                    cli.seed
                );
                clean &= print_tally(&tally, started.elapsed());
            }
        }
    }
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
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
