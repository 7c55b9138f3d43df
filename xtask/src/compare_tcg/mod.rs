//! The same kernel and initial RAM disk on our CPU and on QEMU's TCG, turn by turn.
//!
//! What is compared is processor time, of all threads of the emulator's process: other load on the
//! host disturbs it least. The guest prints lines `begin NAME` and `end NAME COUNT` on its console;
//! what is used up between the two is the workload's, what is used up before the first is the boot's.
//! A boot is also measured with the clock on the wall, and to its end: in a run of its own, whose
//! first process does nothing but switch off. Each side runs once in each round; the figures are
//! medians.

mod guest;
mod side;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use guest::Guest;
use side::{FIRST_PROCESS, POWER_OFF, Side, Times};

/// Options of `compare-tcg`.
#[derive(Args)]
pub(crate) struct Options {
    /// Kernel [default: that of `fourfold run`, which fetches it when first run]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk, whose guest powers off by itself [default: workloads of the kernel]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Add this to the kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "quiet")]
    append: String,
    /// Compare only this
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// How often each side runs
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u32,
    /// What our side translates with: nested, shadow or direct
    #[arg(long, value_name = "NAME", default_value = "nested")]
    paging: String,
    /// The model of QEMU's CPU
    #[arg(long, value_name = "MODEL", default_value = "max")]
    qemu_cpu: String,
    /// A fourfold to be used instead of building it
    #[arg(long, value_name = "FILE")]
    fourfold: Option<PathBuf>,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Boots and switches off.
    Boot,
    /// Runs all workloads.
    Workloads,
}

impl Part {
    /// What stands in an argument where the first process's arguments belong.
    const PLACE: &str = " -- PART";

    /// An argument of an emulator for this part.
    fn fill_in(self, argument: &str) -> String {
        let text = match self {
            Self::Boot => " -- boot",
            Self::Workloads => "",
        };
        argument.replace(Self::PLACE, text)
    }
}

/// Runs both sides and prints what they took.
pub(crate) fn main(options: &Options) -> Result<()> {
    ensure!(options.rounds > 0, "--rounds 0 compares nothing");
    let guest = Guest::prepare(options)?;
    let sides = [Side::ours(options, &guest)?, Side::qemu(options, &guest)];
    let parts = match (options.only, &options.initrd) {
        (Some(part), _) => vec![part],
        (None, Some(_)) => vec![Part::Workloads],
        (None, None) => vec![Part::Boot, Part::Workloads],
    };
    let mut taken: [BTreeMap<usize, Vec<f64>>; 2] = Default::default();
    let mut names = Vec::new();
    for round in 1..=options.rounds {
        for part in &parts {
            for (side, taken) in sides.iter().zip(&mut taken) {
                eprintln!("round {round}: {}, {part:?}", side.name());
                record(&side.run(*part)?, &mut names, taken);
            }
        }
    }
    print(&names, &mut taken)
}

/// The table. The mean leaves out what says the same twice: the clock on the wall, the way to the
/// end.
fn print(names: &[(String, u32)], taken: &mut [BTreeMap<usize, Vec<f64>>; 2]) -> Result<()> {
    println!("{:<20} {:>12} {:>12} {:>7}", "", "fourfold", "TCG", "ratio");
    let mut ratios = Vec::new();
    for (index, (name, count)) in names.iter().enumerate() {
        let ours = median(&mut taken[0], index).with_context(|| format!("no {name} of ours"))?;
        let tcg = median(&mut taken[1], index).with_context(|| format!("no {name} of TCG's"))?;
        let ratio = tcg / ours;
        if name != FIRST_PROCESS[1] && !POWER_OFF.contains(&name.as_str()) {
            ratios.push(ratio);
        }
        let (ours, tcg) = (shown(ours, *count), shown(tcg, *count));
        println!("{name:<20} {ours:>12} {tcg:>12} {ratio:>7.2}");
    }
    let mean = geometric_mean(&ratios);
    println!(
        "{:<20} {:>12} {:>12} {:>7.2}",
        "geometric mean", "", "", mean
    );
    Ok(())
}

/// Adds one run's times under the numbers of their names.
fn record(times: &Times, names: &mut Vec<(String, u32)>, taken: &mut BTreeMap<usize, Vec<f64>>) {
    for time in times {
        let known = names.iter().position(|(name, _)| *name == time.name);
        let index = known.unwrap_or_else(|| {
            names.push((time.name.clone(), time.count));
            names.len() - 1
        });
        taken.entry(index).or_default().push(time.seconds);
    }
}

fn median(taken: &mut BTreeMap<usize, Vec<f64>>, index: usize) -> Option<f64> {
    let times = taken.get_mut(&index)?;
    times.sort_by(f64::total_cmp);
    Some(times[times.len() / 2])
}

fn geometric_mean(ratios: &[f64]) -> f64 {
    let count = ratios.len().max(1) as i32;
    ratios.iter().product::<f64>().powf(1.0 / f64::from(count))
}

/// Seconds, or the time of one of many.
fn shown(seconds: f64, count: u32) -> String {
    let each = seconds / f64::from(count.max(1));
    match each {
        each if each >= 0.1 => format!("{each:.2} s"),
        each if each >= 1e-3 => format!("{:.2} ms", each * 1e3),
        each if each >= 1e-5 => format!("{:.1} us", each * 1e6),
        each => format!("{:.0} ns", each * 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(shown(1.5, 1), "1.50 s");
        assert_eq!(shown(1.5, 1000), "1.50 ms");
        assert_eq!(shown(1.5, 10_000), "150.0 us");
        assert_eq!(shown(1.5, 1_000_000), "1500 ns");
    }

    #[test]
    fn means() {
        assert!((geometric_mean(&[2.0, 8.0]) - 4.0).abs() < 1e-9);
    }

    #[test]
    fn medians_are_by_name() {
        let time = |name: &str, seconds| side::Time {
            name: name.to_owned(),
            count: 1,
            seconds,
        };
        let (mut names, mut taken) = (Vec::new(), BTreeMap::new());
        for seconds in [3.0, 1.0, 2.0] {
            record(
                &vec![time("boot", seconds), time("fork", 10.0 * seconds)],
                &mut names,
                &mut taken,
            );
        }
        assert_eq!(names.len(), 2);
        assert_eq!(median(&mut taken, 0), Some(2.0));
        assert_eq!(median(&mut taken, 1), Some(20.0));
        assert_eq!(median(&mut taken, 2), None);
    }
}
