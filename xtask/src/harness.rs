//! Tasks that are programs of their own crates: built with optimisation and started with the
//! arguments that follow.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Handed on as they are.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Arguments of the task (`--help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// `cargo run --release` of a program of a package.
pub(crate) fn run(package: &str, program: &str, arguments: &Arguments) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["run", "--release", "--quiet", "--package", package])
        .args(["--bin", program, "--"])
        .args(&arguments.rest)
        .status()
        .with_context(|| format!("can't start {program}"))?;
    ensure!(status.success(), "{program} failed with {status}");
    Ok(())
}
