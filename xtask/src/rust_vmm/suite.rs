//! A crate's tests: copied from where cargo fetched the crate, built, listed, run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cargo_metadata::MetadataCommand;

use crate::workspace;

/// Seconds that one test may take.
const LIMIT: &str = "20";
/// Seconds for all examples, which are built first.
const LIMIT_OF_EXAMPLES: &str = "300";

/// Which KVM a test runs on.
#[derive(Clone, Copy)]
pub(super) enum On<'a> {
    /// Ours, by this `fourfold`.
    User(&'a Path),
    /// `/dev/kvm`.
    Kernel,
}

/// One crate, built.
pub(super) struct Suite {
    /// Its name.
    pub(super) name: &'static str,
    copy: PathBuf,
    binary: PathBuf,
}

impl Suite {
    /// Copies the sources that cargo fetched for this workspace, and builds the tests.
    pub(super) fn build(name: &'static str) -> Result<Suite> {
        let copy = workspace::target_directory()?.join(format!("{name}-tests"));
        let source = source(name)?;
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
        let binary = compile(&copy)?;
        Ok(Suite { name, copy, binary })
    }

    /// The names of its unit tests.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        let output = Command::new(&self.binary).arg("--list").output()?;
        let text = String::from_utf8(output.stdout)?;
        let names = text.lines().filter_map(|l| l.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    }

    /// Runs one unit test in a process of its own; whether it passes.
    pub(super) fn passes(&self, test: &str, on: On<'_>) -> Result<bool> {
        let mut command = Command::new("timeout");
        command.arg(LIMIT);
        if let On::User(fourfold) = on {
            command.arg(fourfold).args(["exec", "--"]);
        }
        let output = command
            .arg(&self.binary)
            .args(["--exact", test, "--test-threads", "1"])
            .output()?;
        Ok(output.status.success())
    }

    /// Runs the examples in its documentation: names, without the lines where they stand, and whether
    /// they pass. All of cargo runs on this KVM: rustdoc gives each example a process of its own if it
    /// starts them itself, but not through a runner.
    pub(super) fn examples(&self, on: On<'_>) -> Result<Vec<(String, bool)>> {
        let mut command = Command::new("timeout");
        command.arg(LIMIT_OF_EXAMPLES);
        if let On::User(fourfold) = on {
            command.arg(fourfold).args(["exec", "--"]);
        }
        command.arg(env!("CARGO")).args(["test", "--doc"]);
        let output = in_folder(&mut command, &self.copy).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let results: Vec<_> = text.lines().filter_map(result).collect();
        let announced = text.lines().find_map(announced).unwrap_or(0);
        ensure!(
            results.len() == announced && announced > 0,
            "{}: {} of {announced} examples came to an end:\n{}",
            self.name,
            results.len(),
            String::from_utf8_lossy(&output.stderr)
        );
        let run = results.into_iter().filter_map(|(name, passes)| {
            let (name, _line) = name.rsplit_once(" (line ")?;
            Some((name.to_owned(), passes?))
        });
        Ok(run.collect())
    }
}

/// `running 7 tests`: 7.
fn announced(line: &str) -> Option<usize> {
    let number = line.strip_prefix("running ")?.strip_suffix(" tests")?;
    number.parse().ok()
}

/// `test src/lib.rs - Kvm::new (line 7) ... ok`: its name, and whether it passes; nothing for those
/// that are only compiled, or ignored.
fn result(line: &str) -> Option<(&str, Option<bool>)> {
    let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let passes = match result {
        _ if name.ends_with(" - compile") => None,
        "ok" => Some(true),
        "FAILED" => Some(false),
        _ => None,
    };
    Some((name, passes))
}

/// Cargo on a crate of its own, with a target folder of its own.
fn in_folder<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    command
        .arg("--target-dir")
        .arg(folder.join("target"))
        .current_dir(folder)
        .env_remove("CARGO_TARGET_DIR")
}

fn compile(folder: &Path) -> Result<PathBuf> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["test", "--no-run", "--lib", "--message-format=json"]);
    let output = in_folder(&mut command, folder).output()?;
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

fn source(name: &str) -> Result<PathBuf> {
    let metadata = MetadataCommand::new().exec()?;
    let package = metadata.packages.iter().find(|p| *p.name == name);
    let manifest = &package
        .with_context(|| format!("{name} is no dependency"))?
        .manifest_path;
    let folder = manifest.parent().context("a manifest lies in a folder")?;
    Ok(folder.as_std_path().to_owned())
}
