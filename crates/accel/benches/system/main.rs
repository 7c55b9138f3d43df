//! What system instructions cost, and the ways into a kernel and out of it, beside QEMU's TCG.
//!
//! `cargo bench -p accel --bench system`, or `-- WORD` for the rows with WORD in their names; `--
//! --kvm` also on the kernel's KVM, `-- --alone` on ours only. One guest that times itself runs on
//! each side in turn, several times; the figures are the least, in nanoseconds. Less is not possible
//! by chance, and whatever else runs on the host only adds.

#[macro_use]
mod boot;
mod image;
mod machine;
mod tcg;

use std::time::{Duration, Instant};

use accel::{Preference, choose};
use image::{ABSENT, ROWS};

/// How often each side runs.
const TURNS: usize = 3;

/// The lines that an image prints, or why it doesn't run.
type Lines = Result<Vec<String>, String>;

/// Something that runs the image.
struct Side {
    name: &'static str,
    run: fn(&[u8]) -> Lines,
    /// Ticks of each row that has run; or why none can.
    found: Result<Vec<Option<f64>>, String>,
}

impl Side {
    fn new(name: &'static str, run: fn(&[u8]) -> Lines) -> Self {
        let found = Ok(vec![None; ROWS.len()]);
        Self { name, run, found }
    }

    /// Runs these rows once more, if anything runs at all.
    fn turn(&mut self, image: &[u8], rows: &[usize]) {
        let Ok(least) = &mut self.found else {
            return;
        };
        match (self.run)(image).and_then(|lines| parse(&lines, rows)) {
            Ok(times) => {
                for (row, time) in rows.iter().zip(times) {
                    let least = &mut least[*row];
                    let better = time.filter(|time| least.is_none_or(|least| *time < least));
                    *least = better.or(*least);
                }
            }
            Err(reason) => {
                eprintln!("{}: skipped: {reason}", self.name);
                self.found = Err(reason);
            }
        }
    }

    fn ticks(&self, row: usize) -> Option<f64> {
        self.found.as_ref().ok().and_then(|found| found[row])
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let words: Vec<_> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(*word));
    let rows: Vec<_> = (0..ROWS.len())
        .filter(|row| wanted(ROWS[*row].name))
        .collect();
    let image = image::with_rows(&rows);
    let mut sides = vec![Side::new("fourfold", on_ours)];
    if !has("--alone") {
        sides.push(Side::new("TCG", tcg::run));
    }
    if has("--kvm") {
        sides.push(Side::new("/dev/kvm", on_the_kernels));
    }
    for _ in 0..TURNS {
        for side in &mut sides {
            side.turn(&image, &rows);
        }
    }
    print(&sides, &rows);
}

fn on_ours(image: &[u8]) -> Lines {
    let preference = Preference::User(accel::user::Config::default());
    accelerated(preference, image)
}

fn on_the_kernels(image: &[u8]) -> Lines {
    accelerated(Preference::Kernel, image)
}

fn accelerated(preference: Preference, image: &[u8]) -> Lines {
    let choice = choose(preference).map_err(|refused| refused.to_string())?;
    machine::run(&*choice.accelerator, image)
}

/// Ticks for one of what each row does.
fn parse(lines: &[String], rows: &[usize]) -> Result<Vec<Option<f64>>, String> {
    if lines.len() != rows.len() {
        return Err(format!("{} rows of {}", lines.len(), rows.len()));
    }
    let number = |text: &str| u64::from_str_radix(text.trim(), 16).ok();
    let each = |(line, row): (&String, &usize)| {
        let (ticks, rounds) = line
            .split_once(' ')
            .and_then(|(ticks, rounds)| number(ticks).zip(number(rounds)))
            .ok_or_else(|| format!("not a row: {line}"))?;
        let things = rounds * u64::from(ROWS[*row].each);
        Ok((ticks != ABSENT).then(|| ratio(ticks, things)))
    };
    lines.iter().zip(rows).map(each).collect()
}

fn ratio(dividend: u64, divisor: u64) -> f64 {
    // Both are small enough to be exact.
    let exact = |value: u64| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
    exact(dividend) / exact(divisor)
}

fn print(sides: &[Side], rows: &[usize]) {
    let per_nanosecond = frequency();
    print!("{:<48}", "nanoseconds each, least");
    for side in sides {
        print!("{:>11}", side.name);
    }
    println!("{:>11}", "TCG's");
    let tcg = sides.iter().find(|side| side.name == "TCG");
    for &row in rows {
        print!("{:<48}", ROWS[row].name);
        for side in sides {
            match side.ticks(row) {
                Some(ticks) => print!("{:>11.1}", ticks / per_nanosecond),
                None => print!("{:>11}", "absent"),
            }
        }
        match tcg.and_then(|tcg| tcg.ticks(row)).zip(sides[0].ticks(row)) {
            Some((theirs, ours)) => println!("{:>10.2}x", theirs / ours),
            None => println!("{:>11}", "-"),
        }
    }
}

/// Ticks of the time stamp counter in a nanosecond.
#[expect(unsafe_code, reason = "reads the time stamp counter")]
fn frequency() -> f64 {
    // SAFETY: every x86-64 CPU has the instruction, and only a thread that asked for a trap gets one.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, began) = (ticks(), Instant::now());
    std::thread::sleep(Duration::from_millis(100));
    let passed = ticks() - start;
    ratio(passed, 1000) / (began.elapsed().as_secs_f64() * 1e6)
}
