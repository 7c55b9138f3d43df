//! Tasks that are programs of their own crates: built with optimisation and started with the
//! arguments that follow.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

/// Handed on as they are.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Arguments of the task (`--help` lists them)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// `cargo run --release` of a program of a package, whose exit status becomes ours.
pub(crate) fn run(package: &str, program: &str, arguments: &Arguments) -> Result<ExitCode> {
    let status = Command::new(env!("CARGO"))
        .args(["run", "--release", "--quiet", "--package", package])
        .args(["--bin", program, "--"])
        .args(&arguments.rest)
        .status()
        .with_context(|| format!("can't start {program}"))?;
    // Cargo ends with the program's status; one that a signal ended has none.
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map(ExitCode::from)
        .with_context(|| format!("{program} failed with {status}"))
}
