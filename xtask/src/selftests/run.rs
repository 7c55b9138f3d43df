//! Runs one test with a time limit and says how it ended.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::list::Case;
use crate::workspace;

/// The exit code by which a kselftest says that it skipped itself.
const KSFT_SKIP: i32 = 4;

/// How a test ended.
pub(crate) enum Verdict {
    Pass,
    Skip,
    Fail(ExitStatus),
    TimedOut,
}

/// A test that was run.
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) took: Duration,
    /// The line of its output that says most.
    pub(crate) word: String,
    /// All of it.
    pub(crate) output: String,
}

/// `fourfold exec -- TEST`.
pub(crate) fn on_user(
    fourfold: &Path,
    folder: &Path,
    case: &Case,
    limit: Duration,
) -> Result<Outcome> {
    let mut command = Command::new(fourfold);
    command
        .args(["exec", "--accel", "user"])
        .args(case.options)
        .arg("--")
        .arg(folder.join(&case.test))
        .args(case.arguments);
    run(command, case, limit)
}

/// The test as it is, on `/dev/kvm`.
pub(crate) fn on_kernel(folder: &Path, case: &Case, limit: Duration) -> Result<Outcome> {
    let mut command = Command::new(folder.join(&case.test));
    command.args(case.arguments);
    run(command, case, limit)
}

fn run(mut command: Command, case: &Case, limit: Duration) -> Result<Outcome> {
    let log = workspace::target_directory()?
        .join("selftests-logs")
        .join(case.to_string().replace(['/', ' '], "_"));
    std::fs::create_dir_all(log.parent().context("the log has a folder")?)?;
    let output = File::create(&log)?;
    // A group of its own, so that a time-out ends the children too.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let started = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("can't start {case}"))?;
    let status = wait(&mut child, limit * case.patience())?;
    let took = started.elapsed();
    let verdict = match status {
        None => Verdict::TimedOut,
        Some(status) => judge(status),
    };
    let text = std::fs::read(&log)?;
    let output = String::from_utf8_lossy(&text).into_owned();
    Ok(Outcome {
        verdict,
        took,
        word: telling_line(&output),
        output,
    })
}

fn judge(status: ExitStatus) -> Verdict {
    match (status.code(), status.signal()) {
        (Some(0), _) => Verdict::Pass,
        (Some(KSFT_SKIP), _) => Verdict::Skip,
        _ => Verdict::Fail(status),
    }
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            let group = format!("-{}", child.id());
            Command::new("kill")
                .args(["-KILL", "--", &group])
                .status()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn telling_line(text: &str) -> String {
    let lines = || text.lines().map(str::trim).filter(|l| !l.is_empty());
    let telling = lines()
        .find(|l| l.contains("SKIP") || l.contains("Assert") || l.contains("panicked"))
        .or_else(|| lines().next_back());
    telling.unwrap_or_default().chars().take(100).collect()
}
