//! The report: one row for each thing looked at, then the choice.

use std::fmt;

use serde::Serialize;

/// Whether a thing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Standing {
    /// There, and used.
    Good,
    /// There in part, or not needed.
    Limited,
    /// Not there.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Finding {
    /// Its name.
    pub(crate) name: String,
    /// How it stands.
    pub(crate) standing: Standing,
    /// What was seen.
    pub(crate) seen: String,
    /// What that means for Fourfold.
    pub(crate) effect: String,
    /// How to change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// What was looked at.
    pub(crate) findings: Vec<Finding>,
    /// What `--accel auto` takes, or `null`.
    pub(crate) accelerator: Option<String>,
    /// Why.
    pub(crate) why: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.standing {
            Standing::Good => "ok     ",
            Standing::Limited => "limited",
            Standing::Missing => "missing",
        };
        writeln!(f, "{mark}  {}: {}", self.name, self.seen)?;
        writeln!(f, "           {}", self.effect)?;
        if let Some(remedy) = &self.remedy {
            writeln!(f, "           To change it: {remedy}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            write!(f, "{finding}")?;
        }
        match &self.accelerator {
            Some(accel) => writeln!(f, "\nFourfold will use `--accel {accel}`: {}.", self.why),
            None => writeln!(f, "\nFourfold can't run guests here: {}.", self.why),
        }
    }
}
