//! The tests that measure, on both KVMs alternating, and how many times faster ours is.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::list::Case;
use super::run::{self, Outcome, Verdict};

/// A figure that a test prints.
struct Figure {
    test: &'static str,
    name: &'static str,
    /// What stands before each of its numbers; the numbers of a run are added up.
    labels: &'static [&'static str],
    better: Better,
    /// How many times better ours is to be, where that is promised.
    promise: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Better {
    More,
    Less,
}

const FIGURES: &[Figure] = &[
    Figure {
        test: "demand_paging_test",
        name: "pages a second",
        labels: &["Overall demand paging rate:"],
        better: Better::More,
        promise: Some(30.0),
    },
    Figure {
        test: "dirty_log_perf_test",
        name: "all phases, s",
        labels: &["time:"],
        better: Better::Less,
        promise: Some(10.0),
    },
    Figure {
        test: "dirty_log_perf_test",
        name: "populate, s",
        labels: &["Populate memory time:"],
        better: Better::Less,
        promise: None,
    },
    Figure {
        test: "dirty_log_perf_test",
        name: "write while logging, s",
        labels: &["dirty memory time:"],
        better: Better::Less,
        promise: None,
    },
    Figure {
        test: "dirty_log_perf_test",
        name: "get and clear the log, s",
        labels: &["get dirty log time:", "clear dirty log time:"],
        better: Better::Less,
        promise: None,
    },
    Figure {
        test: "kvm_page_table_test",
        name: "all stages, s",
        labels: &["total execution time:"],
        better: Better::Less,
        promise: Some(10.0),
    },
    Figure {
        test: "kvm_page_table_test",
        name: "first touch, s",
        labels: &["KVM_CREATE_MAPPINGS: total execution time:"],
        better: Better::Less,
        promise: None,
    },
    Figure {
        test: "kvm_page_table_test",
        name: "write-protected, s",
        labels: &["KVM_UPDATE_MAPPINGS: total execution time:"],
        better: Better::Less,
        promise: None,
    },
    Figure {
        test: "kvm_page_table_test",
        name: "log switched off, s",
        labels: &["KVM_ADJUST_MAPPINGS: total execution time:"],
        better: Better::Less,
        promise: None,
    },
];

/// Runs them `rounds` times and prints medians.
pub(crate) fn main(
    fourfold: &Path,
    folder: &Path,
    names: &[String],
    rounds: u32,
    limit: Duration,
) -> Result<()> {
    println!(
        "medians of {rounds} runs, alternating; the host alone first touches {:.0} pages a second",
        first_touch()
    );
    println!(
        "{:<22} {:<26} {:>12} {:>12} {:>9} {:>9}",
        "test", "figure", "user", "kvm", "times", "promised"
    );
    let mut figures: BTreeMap<&str, Vec<&Figure>> = BTreeMap::new();
    for figure in FIGURES.iter().filter(|f| matches(f.test, names)) {
        figures.entry(figure.test).or_default().push(figure);
    }
    ensure!(!figures.is_empty(), "none of that name measures");
    for (test, figures) in figures {
        let case = Case::plain(test);
        let (mut user, mut kernel) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            warm_up();
            user.push(passed(run::on_user(fourfold, folder, &case, limit)?, test)?);
            warm_up();
            kernel.push(passed(run::on_kernel(folder, &case, limit * 3)?, test)?);
        }
        for figure in figures {
            let (ours, theirs) = (figure.median(&user)?, figure.median(&kernel)?);
            let times = match figure.better {
                Better::More => ours / theirs,
                Better::Less => theirs / ours,
            };
            let promise = figure.promise.map_or(String::new(), |p| format!("{p:.0}"));
            println!(
                "{test:<22} {:<26} {ours:>12.4} {theirs:>12.4} {times:>8.1}x {promise:>9}",
                figure.name
            );
        }
    }
    Ok(())
}

fn passed(outcome: Outcome, test: &str) -> Result<String> {
    ensure!(
        matches!(outcome.verdict, Verdict::Pass),
        "{test} did not pass: {}",
        outcome.word
    );
    Ok(outcome.output)
}

impl Figure {
    fn median(&self, outputs: &[String]) -> Result<f64> {
        let values: Result<Vec<f64>> = outputs.iter().map(|o| self.of(o)).collect();
        median(values?).context("no runs")
    }

    fn of(&self, output: &str) -> Result<f64> {
        let numbers: Vec<f64> = output
            .lines()
            .filter_map(|line| self.labels.iter().find_map(|label| after(line, label)))
            .collect();
        ensure!(
            !numbers.is_empty(),
            "{} printed no {}",
            self.test,
            self.name
        );
        Ok(numbers.iter().sum())
    }
}

/// The number behind a label.
fn after(line: &str, label: &str) -> Option<f64> {
    let (_, rest) = line.split_once(label)?;
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn matches(test: &str, names: &[String]) -> bool {
    names.is_empty() || names.iter().any(|name| test.contains(name.as_str()))
}

/// Touches as much memory as a test takes. Where this machine is itself a guest, its host may have
/// taken free memory back, and gives it again page by page: whoever came first would pay.
fn warm_up() {
    const BYTES: usize = 1280 << 20;
    let mut block = vec![0u8; BYTES];
    for page in block.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&block);
}

/// Small pages of fresh memory that a thread of this process can touch in a second: a floor that no
/// guest gets below without help.
fn first_touch() -> f64 {
    const PAGE: usize = 4096;
    const PAGES: u32 = 65536;
    // Rust's allocator maps a block of this size anew, and zeroed memory is not touched.
    let mut block = vec![0u8; PAGES as usize * PAGE];
    let started = std::time::Instant::now();
    for page in block.chunks_mut(PAGE) {
        page[0] = 1;
        std::hint::black_box(page);
    }
    f64::from(PAGES) / started.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_behind_their_labels() {
        let output = "Iteration 1 dirty memory time: 0.25s\nIteration 2 dirty memory time: 0.5s\n\
                      Overall demand paging rate:\t345847.34 pgs/sec\n";
        let of = |name| {
            let figure = FIGURES.iter().find(|f| f.name == name).unwrap();
            figure.of(output).unwrap()
        };
        assert!((of("write while logging, s") - 0.75).abs() < 1e-9);
        assert!((of("pages a second") - 345_847.34).abs() < 1e-6);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
    }
}
