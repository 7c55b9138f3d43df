//! The two results of each test, side by side.

use std::fmt;

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

/// Counts, and the reason of each skip.
pub(crate) fn summary(rows: &[Row]) {
    println!();
    count("user", rows, |r| r.user.as_ref());
    count("kvm", rows, |r| r.kvm.as_ref());
    for row in rows {
        if let Some(Outcome {
            verdict: Verdict::Skip,
            ..
        }) = row.user
        {
            let reason = skip_reason(&row.case.test).unwrap_or("NO LISTED REASON");
            println!("skipped on user: {}: {reason}", row.case);
        }
    }
}

fn count(name: &str, rows: &[Row], of: impl Fn(&Row) -> Option<&Outcome>) {
    let (mut pass, mut skip, mut fail, mut late) = (0, 0, 0, 0);
    for outcome in rows.iter().filter_map(of) {
        match outcome.verdict {
            Verdict::Pass => pass += 1,
            Verdict::Skip => skip += 1,
            Verdict::Fail(_) => fail += 1,
            Verdict::TimedOut => late += 1,
        }
    }
    println!("{name}: {pass} passed, {fail} failed, {late} timed out, {skip} skipped");
}
