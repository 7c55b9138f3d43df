//! The tests of the crate kvm-ioctls, unmodified, on our KVM: `fourfold exec` stands in for
//! `/dev/kvm`.
//!
//! The crate's sources are those that cargo fetched for this workspace.

mod expected;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::MetadataCommand;

use crate::selftests::fourfold;
use crate::workspace;

/// Builds and runs them, each in a process of its own; an error where one fails that is not
/// expected to.
pub(crate) fn main() -> Result<()> {
    let fourfold = fourfold()?;
    let binary = build()?;
    let mut surprises = Vec::new();
    let (mut passed, mut failed) = (0, 0);
    for test in names(&binary)? {
        let passes = passes(&fourfold, &binary, &test)?;
        let reason = expected::reason(&test);
        match (passes, reason) {
            (true, None) => passed += 1,
            (false, Some(reason)) => {
                failed += 1;
                println!("fails as expected: {test}: {reason}");
            }
            (true, Some(reason)) => {
                passed += 1;
                println!("passes on this machine: {test} (elsewhere: {reason})");
            }
            (false, None) => surprises.push(test),
        }
    }
    println!("kvm-ioctls on user: {passed} passed, {failed} failed as expected");
    if !surprises.is_empty() {
        bail!("not expected to fail:\n  {}", surprises.join("\n  "));
    }
    Ok(())
}

/// A copy of the crate's sources, built; the test binary.
fn build() -> Result<PathBuf> {
    let copy = workspace::target_directory()?.join("kvm-ioctls-tests");
    let source = source()?;
    std::fs::create_dir_all(&copy)?;
    let from = format!("{}/.", source.display());
    let status = Command::new("cp").args(["-r", &from]).arg(&copy).status()?;
    ensure!(status.success(), "copying {} failed", source.display());
    // A workspace of its own, not a stray member of ours.
    let manifest = copy.join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest)?;
    if !text.contains("[workspace]") {
        std::fs::write(&manifest, format!("{text}\n[workspace]\n"))?;
    }
    let output = Command::new(env!("CARGO"))
        .args(["test", "--no-run", "--message-format=json", "--target-dir"])
        .arg(copy.join("target"))
        .current_dir(&copy)
        .env_remove("CARGO_TARGET_DIR")
        .output()?;
    ensure!(
        output.status.success(),
        "building the tests failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let executable = text
        .lines()
        .filter_map(|line| line.split_once("\"executable\":\""))
        .filter_map(|(_, rest)| rest.split_once('"'))
        .next_back();
    let (path, _) = executable.context("cargo built no test binary")?;
    Ok(path.into())
}

fn source() -> Result<PathBuf> {
    let metadata = MetadataCommand::new().exec()?;
    let package = metadata.packages.iter().find(|p| *p.name == "kvm-ioctls");
    let manifest = &package
        .context("kvm-ioctls is no dependency")?
        .manifest_path;
    let folder = manifest.parent().context("a manifest lies in a folder")?;
    Ok(folder.as_std_path().to_owned())
}

fn names(binary: &Path) -> Result<Vec<String>> {
    let output = Command::new(binary).arg("--list").output()?;
    let text = String::from_utf8(output.stdout)?;
    let names = text.lines().filter_map(|l| l.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

fn passes(fourfold: &Path, binary: &Path, test: &str) -> Result<bool> {
    let output = Command::new("timeout")
        .arg("20")
        .arg(fourfold)
        .args(["exec", "--"])
        .arg(binary)
        .args(["--exact", test, "--test-threads", "1"])
        .output()?;
    Ok(output.status.success())
}
