//! The tests of whole guests, the long ones included.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Options of `guest-tests`.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain one of these
    names: Vec<String>,
}

/// Runs them one after the other, optimised.
pub(crate) fn main(options: &Options) -> Result<()> {
    let mut arguments = vec![
        "test",
        "--release",
        "--package",
        "fourfold",
        "--test",
        "guest",
    ];
    arguments.extend(["--", "--include-ignored", "--test-threads", "1"]);
    arguments.extend(options.names.iter().map(String::as_str));
    let status = Command::new(env!("CARGO"))
        .args(arguments)
        .status()
        .context("can't start cargo")?;
    ensure!(status.success(), "the tests of guests failed with {status}");
    Ok(())
}
