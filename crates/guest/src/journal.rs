//! Files that must survive a power cut: each is synchronised, its directory too, and only then is
//! its number printed.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

use anyhow::{Context, Result, ensure};

use crate::random::Random;

fn content(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let len = 1 + random.below(100_000) as usize;
    random.bytes(len)
}

/// Writes until somebody pulls the plug. Old files are removed, so that the disk does not fill.
pub(crate) fn write(directory: &Path) -> Result<()> {
    let top = File::open(directory)?;
    let began = last_of(directory)?.map_or(0, |last| last + 1);
    for number in began.. {
        let mut file = File::create(directory.join(number.to_string()))?;
        file.write_all(&content(number))?;
        file.sync_all()?;
        top.sync_all()?;
        println!("synced {number}");
        if let Some(old) = number.checked_sub(KEPT) {
            let _ = fs::remove_file(directory.join(old.to_string()));
        }
    }
    Ok(())
}

/// How many files are kept.
const KEPT: u64 = 100;

fn last_of(directory: &Path) -> Result<Option<u64>> {
    let mut last = None;
    for entry in fs::read_dir(directory)? {
        let number = entry?.file_name().to_string_lossy().parse().ok();
        last = last.max(number);
    }
    Ok(last)
}

/// Checks that the files up to `last` are there and whole.
pub(crate) fn check(directory: &Path, last: u64) -> Result<()> {
    for number in last.saturating_sub(KEPT - 2)..=last {
        let path = directory.join(number.to_string());
        let found = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(found == content(number), "{} has changed", path.display());
    }
    println!("journal: whole up to {last}");
    Ok(())
}
