//! A crate's tests: copied from where cargo fetched the crate, built, listed, run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cargo_metadata::MetadataCommand;

use crate::workspace;

/// Seconds that one test may take.
const LIMIT: &str = "20";

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

    /// Runs the examples in its documentation, each in a process of its own: names, and whether they
    /// pass.
    pub(super) fn examples(&self, fourfold: &Path) -> Result<Vec<(String, bool)>> {
        let output = cargo(&self.copy, &["test", "--doc"])
            .env(
                "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER",
                format!("timeout {LIMIT} {} exec --", fourfold.display()),
            )
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let results = text
            .lines()
            .filter_map(|line| line.strip_prefix("test ")?.rsplit_once(" ... "))
            .filter(|(_, result)| matches!(*result, "ok" | "FAILED"))
            // Those that are only compiled are not run.
            .filter(|(name, _)| !name.ends_with(" - compile"))
            .map(|(name, result)| (name.to_owned(), result == "ok"));
        Ok(results.collect())
    }
}

fn cargo(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(arguments)
        .arg("--target-dir")
        .arg(folder.join("target"))
        .current_dir(folder)
        .env_remove("CARGO_TARGET_DIR");
    command
}

fn compile(folder: &Path) -> Result<PathBuf> {
    let output = cargo(
        folder,
        &["test", "--no-run", "--lib", "--message-format=json"],
    )
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

fn source(name: &str) -> Result<PathBuf> {
    let metadata = MetadataCommand::new().exec()?;
    let package = metadata.packages.iter().find(|p| *p.name == name);
    let manifest = &package
        .with_context(|| format!("{name} is no dependency"))?
        .manifest_path;
    let folder = manifest.parent().context("a manifest lies in a folder")?;
    Ok(folder.as_std_path().to_owned())
}
