//! Whether a difference comes back, and if it does not, which side changed its mind.
//!
//! Upon a difference both sides run the same batch again, and the case alone, several times. Each
//! side is compared with itself as well as with the other.
//!
//! | native, the batch again | under test, again | native then agrees | verdict |
//! |---|---|---|---|
//! | the same | the same | - | [`Verdict::Differs`] |
//! | anything | another at least once | - | [`Verdict::SubjectChanged`] |
//! | another at least once | always the same | at least half the time | [`Verdict::HostUnsteady`] |
//! | another at least once | always the same | less often | [`Verdict::Differs`] |
//!
//! Only the last but one is not held against the side under test: the physical CPU (or its kernel, or
//! the hypervisor below) gave two results for one case, and the usual one is what the side under test
//! gave each time.

use anyhow::Result;

use crate::case::{Batch, Executor, Outcome};
use crate::compare::{Difference, compare};
use crate::generate::Tolerance;
use crate::minimise::Pair;

/// How often the batch runs again on each side.
const BATCHES: usize = 4;
/// How often the case runs again alone.
const ALONE: usize = 6;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Two sides that differ: a bug.
    Differs,
    /// The side under test gave two results: a bug, whatever the other did.
    SubjectChanged,
    /// The physical CPU gave two results, and the side under test always the usual one.
    HostUnsteady,
}

/// One side's further results.
#[derive(Clone, Debug, Default)]
pub struct Again {
    /// What differs from its first result, for each run of the whole batch.
    pub batches: Vec<Vec<Difference>>,
    /// The same for each run of the case alone.
    pub alone: Vec<Vec<Difference>>,
}

impl Again {
    fn all(&self) -> impl Iterator<Item = &Vec<Difference>> {
        self.batches.iter().chain(&self.alone)
    }

    /// How many of the runs gave another result than the first.
    pub fn changes(&self) -> usize {
        self.all().filter(|changed| !changed.is_empty()).count()
    }

    /// How many runs there were.
    pub fn runs(&self) -> usize {
        self.all().count()
    }
}

/// What came of running both sides again.
#[derive(Clone, Debug, Default)]
pub struct Trials {
    /// The oracle against its first result.
    pub native: Again,
    /// The side under test against its first result.
    pub subject: Again,
    /// In how many of the runs the sides agreed with each other.
    pub agreed: usize,
}

impl Trials {
    /// See [`Verdict`].
    pub fn verdict(&self) -> Verdict {
        let changed_by_itself = self.native.batches.iter().any(|b| !b.is_empty());
        if self.subject.changes() != 0 {
            Verdict::SubjectChanged
        } else if changed_by_itself && 2 * self.agreed >= self.native.runs() {
            Verdict::HostUnsteady
        } else {
            Verdict::Differs
        }
    }

    /// Whether the sides still differ, each time and in the same way.
    pub fn is_reproducible(&self) -> bool {
        self.agreed == 0 && self.native.changes() == 0 && self.subject.changes() == 0
    }
}

/// A case in which the sides differed.
pub struct Sighting<'a> {
    /// Where it ran.
    pub batch: &'a Batch,
    /// Which of its cases.
    pub index: usize,
    /// What is not compared.
    pub tolerance: Tolerance,
    /// What the oracle said.
    pub expected: &'a Outcome,
    /// What the side under test said.
    pub found: &'a Outcome,
    /// What differs between the two.
    pub differences: Vec<Difference>,
}

impl Sighting<'_> {
    /// Runs both sides again.
    pub fn again(&self, pair: &mut Pair<'_>) -> Result<Trials> {
        let mut trials = Trials::default();
        for _ in 0..BATCHES {
            let (native, subject) = self.once(pair, self.batch, self.index, &mut trials)?;
            trials.native.batches.push(native);
            trials.subject.batches.push(subject);
        }
        let alone = self.alone();
        for _ in 0..ALONE {
            let (native, subject) = self.once(pair, &alone, 0, &mut trials)?;
            trials.native.alone.push(native);
            trials.subject.alone.push(subject);
        }
        Ok(trials)
    }

    /// The case in a batch of its own.
    pub(crate) fn alone(&self) -> Batch {
        let mut case = self.batch.cases[self.index];
        case.program = 0;
        Batch {
            pattern: self.batch.pattern.clone(),
            programs: vec![*self.batch.program(self.index)],
            cases: vec![case],
        }
    }

    /// What each side now says that it did not say at first.
    fn once(
        &self,
        pair: &mut Pair<'_>,
        batch: &Batch,
        index: usize,
        trials: &mut Trials,
    ) -> Result<(Vec<Difference>, Vec<Difference>)> {
        let native = outcome(pair.native, batch, index)?;
        let subject = outcome(pair.subject, batch, index)?;
        let differences = |a: &Outcome, b: &Outcome| compare(a, b, self.tolerance);
        trials.agreed += usize::from(differences(&native, &subject).is_empty());
        Ok((
            differences(self.expected, &native),
            differences(self.found, &subject),
        ))
    }
}

fn outcome(side: &mut dyn Executor, batch: &Batch, index: usize) -> Result<Outcome> {
    let mut outcomes = Vec::new();
    side.run(batch, &mut outcomes)?;
    Ok(outcomes[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `changed` tells for each run of the batch, then of the case alone, whether the result was
    /// another than the first.
    fn again(changed: [bool; 4]) -> Again {
        let other = Difference {
            place: "ymm0".into(),
            expected: "0".into(),
            found: "1".into(),
        };
        let of = |changed: bool| changed.then(|| other.clone()).into_iter().collect();
        Again {
            batches: changed[..2].iter().map(|c| of(*c)).collect(),
            alone: changed[2..].iter().map(|c| of(*c)).collect(),
        }
    }

    fn verdict(native: [bool; 4], subject: [bool; 4], agreed: usize) -> Verdict {
        Trials {
            native: again(native),
            subject: again(subject),
            agreed,
        }
        .verdict()
    }

    const SAME: [bool; 4] = [false; 4];
    const OTHER: [bool; 4] = [true; 4];

    #[test]
    fn two_sides_that_stay_as_they_are_differ() {
        assert_eq!(verdict(SAME, SAME, 0), Verdict::Differs);
    }

    #[test]
    fn the_host_alone_changed_its_mind() {
        assert_eq!(verdict(OTHER, SAME, 4), Verdict::HostUnsteady);
        assert_eq!(
            verdict([true, true, true, false], SAME, 3),
            Verdict::HostUnsteady
        );
    }

    #[test]
    fn the_side_under_test_is_never_excused() {
        assert_eq!(verdict(SAME, OTHER, 4), Verdict::SubjectChanged);
        assert_eq!(verdict(OTHER, OTHER, 4), Verdict::SubjectChanged);
        let once = [false, false, false, true];
        assert_eq!(verdict(OTHER, once, 4), Verdict::SubjectChanged);
    }

    #[test]
    fn a_host_that_changes_to_a_third_result_excuses_nobody() {
        assert_eq!(verdict(OTHER, SAME, 0), Verdict::Differs);
        assert_eq!(verdict(OTHER, SAME, 1), Verdict::Differs);
    }

    #[test]
    fn what_runs_before_it_is_no_unsteadiness() {
        // The batch says the same each time, the case alone another thing: what ran before matters.
        let alone = [false, false, true, true];
        assert_eq!(verdict(alone, SAME, 2), Verdict::Differs);
    }
}
