//! The two results of each test, side by side.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::list::{Case, skip_reason};
use super::run::{Outcome, Verdict};

/// One test on both KVMs.
pub(crate) struct Row {
    pub(crate) case: Case,
    pub(crate) user: Option<Outcome>,
    pub(crate) kvm: Option<Outcome>,
}

impl Row {
    /// Whether ours did not do what it promises: a failure, a time-out, or a skip that no listed
    /// reason excuses.
    pub(crate) fn is_failure(&self) -> bool {
        match self.user.as_ref().map(|o| &o.verdict) {
            None | Some(Verdict::Pass) => false,
            Some(Verdict::Skip) => {
                !self.case.options.is_empty() || skip_reason(&self.case.test).is_none()
            }
            Some(Verdict::Fail(_) | Verdict::TimedOut) => true,
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<48}", self.case)?;
        write!(f, " user {}", cell(self.user.as_ref()))?;
        write!(f, "   kvm {}", cell(self.kvm.as_ref()))?;
        match &self.user {
            Some(Outcome {
                verdict: Verdict::Pass,
                ..
            })
            | None => Ok(()),
            Some(Outcome {
                verdict: Verdict::Fail(status),
                word,
                ..
            }) => {
                write!(f, "   {status}: {word}")
            }
            Some(outcome) => write!(f, "   {}", outcome.word),
        }
    }
}

fn cell(outcome: Option<&Outcome>) -> String {
    let Some(outcome) = outcome else {
        return format!("{:<16}", "not run");
    };
    let verdict = match &outcome.verdict {
        Verdict::Pass => "pass",
        Verdict::Skip => "skip",
        Verdict::Fail(_) => "FAIL",
        Verdict::TimedOut => "TIME-OUT",
    };
    format!("{verdict:<8} {:>5.1} s", outcome.took.as_secs_f64())
}

/// What was found so far: printed as it comes, and kept.
pub(crate) struct Report {
    rows: Vec<Row>,
    tests: usize,
    text: String,
    started: Instant,
}

impl Report {
    /// Of so many tests.
    pub(crate) fn new(tests: usize) -> Self {
        let mut report = Self {
            rows: Vec::new(),
            tests,
            text: String::new(),
            started: Instant::now(),
        };
        report.say(&format!("{tests} tests; Linux {}", release()));
        report
    }

    fn say(&mut self, line: &str) {
        println!("{line}");
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// One that this machine can't run.
    pub(crate) fn leave_out(&mut self, case: &Case) {
        let processors = case.processors();
        self.say(&format!(
            "{case:<48} not run: it needs {processors} processors"
        ));
    }

    /// One that was run.
    pub(crate) fn add(&mut self, row: Row) {
        self.say(&row.to_string());
        self.rows.push(row);
    }

    /// Counts, times and the reason of each skip; writes all of it to `file`. How many did not do what
    /// they promise.
    pub(crate) fn finish(mut self, file: &Path) -> Result<usize> {
        let rows = std::mem::take(&mut self.rows);
        self.say("");
        if let Some(line) = count("user", &rows, |r| r.user.as_ref()) {
            self.say(&line);
        }
        if let Some(line) = count("kvm", &rows, |r| r.kvm.as_ref()) {
            self.say(&line);
        }
        for row in &rows {
            if let Some(Outcome {
                verdict: Verdict::Skip,
                ..
            }) = row.user
            {
                let reason = skip_reason(&row.case.test).unwrap_or("NO LISTED REASON");
                self.say(&format!("skipped on user: {}: {reason}", row.case));
            }
        }
        let took = self.started.elapsed().as_secs();
        self.say(&format!(
            "{} tests in {} min {} s",
            self.tests,
            took / 60,
            took % 60
        ));
        std::fs::write(file, &self.text)?;
        println!("kept in {}", file.display());
        Ok(rows.iter().filter(|r| r.is_failure()).count())
    }
}

fn release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.unwrap_or_default().trim().to_owned()
}

/// Nothing where none ran.
fn count(name: &str, rows: &[Row], of: impl Fn(&Row) -> Option<&Outcome>) -> Option<String> {
    let mut took = Duration::ZERO;
    let (mut pass, mut skip, mut fail, mut late) = (0, 0, 0, 0);
    for outcome in rows.iter().filter_map(of) {
        took += outcome.took;
        match outcome.verdict {
            Verdict::Pass => pass += 1,
            Verdict::Skip => skip += 1,
            Verdict::Fail(_) => fail += 1,
            Verdict::TimedOut => late += 1,
        }
    }
    let took = took.as_secs_f64();
    (took > 0.0).then(|| {
        format!(
            "{name}: {pass} passed, {fail} failed, {late} timed out, {skip} skipped; {took:.0} s"
        )
    })
}
