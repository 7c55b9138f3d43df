//! Hostile input for minutes: broken images, changing disks, and a guest that writes garbage to
//! every port, register, ring and configuration space.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

/// Options of `hostile`.
#[derive(Args)]
pub(crate) struct Options {
    /// How long each kind of input goes on, all of them at the same time
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    seconds: u64,
    /// The first seed
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Runs the tests that `cargo test` runs for seconds.
pub(crate) fn main(options: &Options) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["test", "--release", "--package", "vmm", "--test", "hostile"])
        .args(["--", "--nocapture", "--test-threads", "4"])
        .env("FOURFOLD_FUZZ_SECONDS", options.seconds.to_string())
        .env("FOURFOLD_FUZZ_SEED", options.seed.to_string())
        .status()
        .context("can't start cargo")?;
    ensure!(status.success(), "hostile input: {status}");
    Ok(())
}
