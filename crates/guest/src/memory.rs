//! Memory: each thread fills its pages with numbers that follow from a seed and the page's place,
//! changes some of them in random order, and checks all.

use std::{fs, thread};

use anyhow::{Context, Result, ensure};

use crate::{cpus, random::Random};

const WORDS: usize = 512;

type Page = [u64; WORDS];

pub(crate) fn run(percent: u64) -> Result<()> {
    let bytes = available()? * percent / 100;
    let threads = cpus();
    let pages = bytes as usize / size_of::<Page>() / threads;
    let workers: Vec<_> = (0..threads)
        .map(|worker| thread::spawn(move || strain(worker as u64, pages)))
        .collect();
    for worker in workers {
        worker.join().ok().context("a thread panicked")??;
    }
    println!(
        "memory: {} MiB on {threads} CPUs held what was written",
        bytes >> 20
    );
    Ok(())
}

fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .context("no MemAvailable")?
        .parse()?;
    Ok(kib << 10)
}

fn strain(worker: u64, count: usize) -> Result<()> {
    let mut pages: Vec<Page> = vec![[0; WORDS]; count];
    let mut changes = vec![0_u64; count];
    for (index, page) in pages.iter_mut().enumerate() {
        fill(page, seed(worker, index, 0));
    }
    let mut random = Random::new(worker);
    for round in 1..=count as u64 / 2 {
        let index = random.below(count as u64) as usize;
        check(&pages[index], worker, index, changes[index])?;
        fill(&mut pages[index], seed(worker, index, round));
        changes[index] = round;
    }
    for (index, page) in pages.iter().enumerate() {
        check(page, worker, index, changes[index])?;
    }
    Ok(())
}

fn seed(worker: u64, index: usize, round: u64) -> u64 {
    worker << 56 ^ (index as u64) << 24 ^ round
}

fn fill(page: &mut Page, seed: u64) {
    let mut random = Random::new(seed);
    page.fill_with(|| random.next());
}

fn check(page: &Page, worker: u64, index: usize, round: u64) -> Result<()> {
    let mut random = Random::new(seed(worker, index, round));
    for (at, word) in page.iter().enumerate() {
        let expected = random.next();
        ensure!(
            *word == expected,
            "page {index} of worker {worker}, word {at}: {word:#x} instead of {expected:#x}"
        );
    }
    Ok(())
}
