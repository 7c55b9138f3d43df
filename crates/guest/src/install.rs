//! What a package manager does to a disk: files are written under another name, synchronised and
//! renamed; a database is rewritten after each package; some packages are removed again.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};

use crate::random::Random;

const FILES: u64 = 8;

pub(crate) fn run(root: &Path, packages: u64) -> Result<()> {
    let mut installed = Vec::new();
    for package in 0..packages {
        install(root, package)?;
        installed.push(package);
        if package % 3 == 2 {
            remove(root, package - 1)?;
            installed.retain(|other| *other != package - 1);
        }
        write_database(root, &installed)?;
    }
    for package in &installed {
        for file in 0..FILES {
            let path = path(root, *package, file);
            ensure!(
                fs::read(&path)? == content(*package, file),
                "{}",
                path.display()
            );
        }
    }
    println!("install: {packages} packages, {} stayed", installed.len());
    Ok(())
}

fn path(root: &Path, package: u64, file: u64) -> PathBuf {
    let directory = ["usr/bin", "usr/lib", "usr/share/doc", "etc"][file as usize % 4];
    root.join(directory)
        .join(format!("package-{package}"))
        .join(file.to_string())
}

fn content(package: u64, file: u64) -> Vec<u8> {
    let mut random = Random::new(package << 8 | file);
    let len = random.below(60_000) as usize;
    random.bytes(len)
}

fn install(root: &Path, package: u64) -> Result<()> {
    for file in 0..FILES {
        let path = path(root, package, file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        replace(&path, &content(package, file))?;
    }
    Ok(())
}

fn remove(root: &Path, package: u64) -> Result<()> {
    for file in 0..FILES {
        let path = path(root, package, file);
        fs::remove_file(&path)?;
        // The last file's removal empties the directory.
        if let Some(parent) = path.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
    Ok(())
}

fn write_database(root: &Path, installed: &[u64]) -> Result<()> {
    let names: Vec<_> = installed.iter().map(u64::to_string).collect();
    let text = names.join("\n");
    let directory = root.join("var/lib");
    fs::create_dir_all(&directory)?;
    replace(&directory.join("status"), text.as_bytes())
}

/// New content under the old name, whole or not at all.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(new, path)?;
    Ok(())
}
