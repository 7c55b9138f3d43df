//! The differential test as a command: see `cargo xtask differential --help`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;

use differential::campaign::{self, Effort, MODES, Progress, Tally};
use differential::case::{Executor, Mode};
use differential::generate::Catalogue;
use differential::guest::{GuestCpu, Translation};
use differential::minimise::Pair;
use differential::native::NativeCpu;

/// Runs every form of instruction natively and translated, and compares bit for bit
///
/// Ends with 0 where nothing differs, with 1 where something does, and with 3 where the only
/// differences are cases of which the host itself gave two results.
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
    /// Add what differs to this file, too
    #[arg(long)]
    record: Option<PathBuf>,
}

/// How a run ended, the worst last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Judgement {
    Clean,
    HostUnsteady,
    Diverges,
}

impl From<Judgement> for ExitCode {
    fn from(judgement: Judgement) -> Self {
        match judgement {
            Judgement::Clean => Self::SUCCESS,
            Judgement::HostUnsteady => Self::from(3),
            Judgement::Diverges => Self::FAILURE,
        }
    }
}

/// Modes times translations times kinds of programs: what the time is shared among.
const RUNS: f64 = 9.0;

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
    let mut worst = Judgement::Clean;
    for mode in MODES {
        for translation in [Translation::Blocks, Translation::Stepped] {
            worst = worst.max(run(&cli, mode, translation, &mut native, effort)?);
        }
    }
    if worst == Judgement::HostUnsteady {
        println!("the host was not steady: it gave two results for one case, see above");
    }
    Ok(worst.into())
}

fn run(
    cli: &Cli,
    mode: Mode,
    translation: Translation,
    native: &mut NativeCpu,
    effort: Effort,
) -> Result<Judgement> {
    let mut catalogue = Catalogue::new(mode);
    if let Some(pattern) = &cli.forms {
        catalogue.restrict(pattern);
    }
    let mut subject = subject(cli, translation)?;
    let mut pair = Pair {
        native,
        subject: &mut *subject,
    };
    let mut worst = Judgement::Clean;
    if !cli.blocks && translation != Translation::Stepped {
        let started = Instant::now();
        let tally = campaign::single_instructions(&mut catalogue, effort, &mut pair)?;
        let title = title(cli, mode, "single instructions", &pair);
        println!("{title}");
        print_catalogue(&catalogue, cli);
        print_tally(&tally, started.elapsed());
        worst = worst.max(judge(cli, &title, &tally)?);
    }
    if !cli.singles {
        let started = Instant::now();
        let tally = campaign::blocks(&catalogue, mode, effort, &mut pair)?;
        let title = title(cli, mode, "whole programs", &pair);
        println!("{title}");
        print_tally(&tally, started.elapsed());
        worst = worst.max(judge(cli, &title, &tally)?);
    }
    Ok(worst)
}

fn title(cli: &Cli, mode: Mode, what: &str, pair: &Pair<'_>) -> String {
    let name = pair.subject.name();
    format!("{mode:?}, {what}, {name}, seed {}", cli.seed)
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

fn print_tally(tally: &Tally, time: Duration) {
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
    for divergence in tally.divergences.iter().chain(&tally.unsteadies) {
        println!("{divergence}");
    }
    print_counts("divergences", &tally.diverging);
    if !tally.unsteady.is_empty() {
        print_counts("cases of which the host gave two results", &tally.unsteady);
    }
}

fn print_counts(what: &str, counts: &BTreeMap<String, u64>) {
    let sum: u64 = counts.values().sum();
    println!("  {what}: {sum} in {} forms", counts.len());
    for (name, count) in counts {
        println!("    {count:6} {name}");
    }
}

/// Also writes down what there is.
fn judge(cli: &Cli, title: &str, tally: &Tally) -> Result<Judgement> {
    if let Some(path) = &cli.record {
        record(path, title, tally).with_context(|| format!("can't write {}", path.display()))?;
    }
    Ok(if !tally.diverging.is_empty() {
        Judgement::Diverges
    } else if !tally.unsteady.is_empty() {
        Judgement::HostUnsteady
    } else {
        Judgement::Clean
    })
}

fn record(path: &Path, title: &str, tally: &Tally) -> Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    for divergence in tally.divergences.iter().chain(&tally.unsteadies) {
        write!(file, "{title}\n{divergence}\n")?;
    }
    Ok(())
}
