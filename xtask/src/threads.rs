//! What threads do to each other: every order of steps (loom), and what an instrumented run sees
//! (the thread sanitizer).

use std::path::Path;
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

/// `cargo xtask tsan`: tests whose threads meet, with every access watched.
///
/// The standard library is not instrumented where its source isn't installed; what that makes
/// the thread sanitizer say wrongly is listed, with reasons, in `tsan.supp`.
pub(crate) fn tsan() -> Result<()> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let nightly = Command::new("rustc")
        .args(["+nightly", "--version"])
        .output();
    if !nightly.is_ok_and(|output| output.status.success()) {
        println!(
            "SKIPPED: ThreadSanitizer needs a nightly compiler: rustup toolchain install nightly"
        );
        return Ok(());
    }
    let suppressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("tsan.supp");
    for (package, tests) in TSAN {
        let mut cargo = Command::new("cargo");
        cargo
            .args(["+nightly", "test", "--release", "--package", package])
            .args(["--target", TARGET, "--target-dir", &folder("tsan")])
            .args(tests.iter())
            .env(
                "RUSTFLAGS",
                "--cfg tsan -Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer",
            )
            .env(
                "TSAN_OPTIONS",
                format!(
                    "halt_on_error=0 exitcode=66 suppressions={}",
                    suppressions.display()
                ),
            );
        run(cargo, &format!("ThreadSanitizer on {package}"))?;
    }
    Ok(())
}

/// Packages, and which of their tests.
const TSAN: [(&str, &[&str]); 2] = [
    ("memory", &["--lib", "--test", "readers"]),
    ("mmu", &["--test", "parallel"]),
];

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
