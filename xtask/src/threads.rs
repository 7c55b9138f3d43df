//! What threads do to each other: every order of steps.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// `cargo xtask loom`: the handshakes of `memory::models` under every order of steps that the
/// language's memory model allows.
///
/// Built in a folder of its own: another configuration would have everything else built anew.
pub(crate) fn loom() -> Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["test", "--release", "--package", "memory", "--lib"])
        .args(["--target-dir", &folder("loom")])
        .args(["--", "models::"])
        .env("RUSTFLAGS", "--cfg loom")
        // Models that break a rule on purpose panic on purpose.
        .env("RUST_BACKTRACE", "0");
    run(cargo, "the models")
}

fn folder(name: &str) -> String {
    let target = std::env::var("CARGO_TARGET_DIR")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../target").into());
    format!("{target}/{name}")
}

fn run(mut cargo: Command, what: &str) -> Result<()> {
    let status = cargo
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .status()
        .with_context(|| format!("can't start {what}"))?;
    ensure!(status.success(), "{what} failed with {status}");
    Ok(())
}
