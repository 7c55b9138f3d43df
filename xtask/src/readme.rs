//! Runs the commands that the README shows, as it shows them.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// The gate itself, which can't run inside itself.
const THE_GATE: &str = "cargo xtask check";

/// Runs each line of each `sh` block of README.md.
pub(crate) fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("README.md")).context("reading README.md")?;
    let commands = commands(&text);
    ensure!(
        commands.contains(&THE_GATE),
        "the README does not say how to test"
    );
    for command in commands.into_iter().filter(|c| *c != THE_GATE) {
        println!("==> README: {command}");
        let started = Instant::now();
        let status = Command::new("sh")
            .args(["-c", command])
            .current_dir(&root)
            // The page says `target`.
            .env_remove("CARGO_TARGET_DIR")
            .status()
            .with_context(|| format!("can't start {command}"))?;
        ensure!(
            status.success(),
            "the README's `{command}` ended with {status}"
        );
        println!("    {:.1} s", started.elapsed().as_secs_f64());
    }
    Ok(())
}

fn commands(text: &str) -> Vec<&str> {
    let mut commands = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside && !line.trim().is_empty() => commands.push(line),
            _ => {}
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_lines_of_sh_blocks_alone() {
        let text = "a\n```sh\none\n\ntwo\n```\n```\nthree\n```\n    four\n";
        assert_eq!(commands(text), ["one", "two"]);
    }
}
