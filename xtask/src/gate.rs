//! The steps of the gate, in the order that fails fastest.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{layers, readme, selftests, threads};

/// Runs every step and stops at the first that fails.
pub(crate) fn check() -> Result<()> {
    layers::check()?;
    cargo(&["fmt", "--all", "--check"], &[])?;
    cargo(
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        &[],
    )?;
    cargo(
        &[
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ],
        // Private items are documented, too: these docs are for those who read the code.
        &[(
            "RUSTDOCFLAGS",
            "-D warnings -A rustdoc::private-intra-doc-links",
        )],
    )?;
    cargo(&["test", "--workspace"], &[])?;
    threads::loom()?;
    selftests::core()?;
    readme::run()
}

/// Writes the documentation of the ioctl table: the test that compares it, told to write instead.
pub(crate) fn ioctls() -> Result<()> {
    cargo(
        &["test", "-q", "-p", "kvm", "--test", "document"],
        &[("BLESS", "1")],
    )
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let line = format!("cargo {}", args.join(" "));
    println!("==> {line}");
    let started = Instant::now();
    let status = Command::new(env!("CARGO"))
        .args(args)
        .envs(env.iter().copied())
        .status()
        .with_context(|| format!("can't start {line}"))?;
    ensure!(status.success(), "{line} failed with {status}");
    println!("    {line}: {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
