//! Runs one test with a time limit and says how it ended.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
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
    let mut command = behind_us(fourfold);
    command
        .args(["exec", "--accel", "user"])
        .args(case.options)
        .arg("--")
        .arg(folder.join(&case.test))
        .args(case.arguments);
    run(command, case, Side::User, limit)
}

/// The test as it is, on `/dev/kvm`.
pub(crate) fn on_kernel(folder: &Path, case: &Case, limit: Duration) -> Result<Outcome> {
    let mut command = behind_us(&folder.join(&case.test));
    command.args(case.arguments);
    run(command, case, Side::Kernel, limit)
}

/// One step less urgent than this process, that a test whose threads spin can't keep it from ending
/// the test.
fn behind_us(program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "1"]).arg(program);
    command
}

/// Whose KVM a test runs on.
#[derive(Clone, Copy)]
enum Side {
    User,
    Kernel,
}

/// The folder of what the tests print.
pub(super) fn logs() -> Result<PathBuf> {
    let logs = workspace::target_directory()?.join("selftests-logs");
    std::fs::create_dir_all(&logs)?;
    Ok(logs)
}

fn run(mut command: Command, case: &Case, side: Side, limit: Duration) -> Result<Outcome> {
    let suffix = match side {
        Side::User => "user",
        Side::Kernel => "kvm",
    };
    let name = case.to_string().replace(['/', ' '], "_");
    let log = logs()?.join(format!("{name}.{suffix}"));
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

/// How long a killed process may take to end; one that hangs in the kernel's KVM never does.
const DYING: Duration = Duration::from_secs(10);

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let status = ended(child, limit)?;
    // Whom it left behind, too.
    let group = format!("-{}", child.id());
    Command::new("kill")
        .args(["-KILL", "--", &group])
        .stderr(Stdio::null())
        .status()?;
    if status.is_none() && ended(child, DYING)?.is_none() {
        println!("process {} can't be killed and stays behind", child.id());
    }
    Ok(status)
}

fn ended(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(None)
}

fn telling_line(text: &str) -> String {
    let lines = || text.lines().map(str::trim).filter(|l| !l.is_empty());
    let telling = lines()
        .find(|l| l.contains("SKIP") || l.contains("Assert") || l.contains("panicked"))
        .or_else(|| lines().next_back());
    telling.unwrap_or_default().chars().take(100).collect()
}
