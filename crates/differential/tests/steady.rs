//! A side that changes its mind, and what the campaign says of it. Both sides are the physical CPU; one
//! of them lies.

use std::time::Duration;

use anyhow::Result;
use differential::campaign::{self, Effort, Progress, Tally};
use differential::case::{Batch, Executor, Mode, Outcome};
use differential::generate::Catalogue;
use differential::minimise::Pair;
use differential::native::NativeCpu;

/// When the bit is wrong.
#[derive(Clone, Copy)]
enum Lie {
    Never,
    /// In the first batch.
    Once,
    /// In every batch, but not where a case runs alone.
    InBatches,
    Always,
}

/// The physical CPU with one bit of XMM0 wrong in the fifth outcome of a batch, or the only one.
struct Liar {
    cpu: NativeCpu,
    lie: Lie,
    runs: usize,
}

impl Liar {
    fn new(lie: Lie) -> Self {
        let cpu = NativeCpu::new().unwrap();
        Self { cpu, lie, runs: 0 }
    }

    fn lies(&self, cases: usize) -> bool {
        match self.lie {
            Lie::Never => false,
            Lie::Once => self.runs == 1,
            Lie::InBatches => cases > 1,
            Lie::Always => true,
        }
    }
}

impl Executor for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn run(&mut self, batch: &Batch, outcomes: &mut Vec<Outcome>) -> Result<()> {
        self.cpu.run(batch, outcomes)?;
        self.runs += 1;
        if self.lies(batch.cases.len()) {
            let at = 4.min(outcomes.len() - 1);
            outcomes[at].state.extended.0[160] ^= 1;
        }
        Ok(())
    }
}

/// One form, and what the campaign prints.
fn campaign(native: Lie, subject: Lie) -> (Tally, String) {
    let mut catalogue = Catalogue::new(Mode::Long);
    catalogue.restrict("VEX_Vphsubd_xmm");
    let effort = Effort {
        seed: 97,
        encodings: 1,
        states: 8,
        time: Duration::ZERO,
        kept: 3,
        progress: Progress::Quiet,
    };
    let (mut native, mut subject) = (Liar::new(native), Liar::new(subject));
    let mut pair = Pair {
        native: &mut native,
        subject: &mut subject,
    };
    let tally = campaign::single_instructions(&mut catalogue, effort, &mut pair).unwrap();
    let all = tally.divergences.iter().chain(&tally.unsteadies);
    let text = all.map(ToString::to_string).collect();
    (tally, text)
}

#[test]
fn a_host_that_lies_once_is_not_steady() {
    let (tally, text) = campaign(Lie::Once, Lie::Never);
    assert!(tally.diverging.is_empty(), "{:?}", tally.diverging);
    assert_eq!(tally.unsteady.values().sum::<u64>(), 1);
    assert!(text.contains("THE HOST WAS NOT STEADY"), "{text}");
    assert!(text.contains("native: another result 10 times"), "{text}");
    assert!(
        text.contains("under test: another result 0 times"),
        "{text}"
    );
    assert!(text.contains("native at first: vector 0x3"), "{text}");
}

#[test]
fn a_side_under_test_that_lies_once_diverges() {
    let (tally, text) = campaign(Lie::Never, Lie::Once);
    assert!(tally.unsteady.is_empty(), "{:?}", tally.unsteady);
    assert_eq!(tally.diverging.values().sum::<u64>(), 1);
    assert!(
        text.contains("the side under test changed its mind"),
        "{text}"
    );
    assert!(
        text.contains("under test: another result 10 times"),
        "{text}"
    );
}

#[test]
fn what_depends_on_the_cases_before_is_not_the_hosts_fault() {
    let (tally, text) = campaign(Lie::InBatches, Lie::Never);
    assert!(tally.unsteady.is_empty(), "{:?}", tally.unsteady);
    assert_eq!(tally.diverging.values().sum::<u64>(), 1);
    assert!(text.contains("not always the same difference"), "{text}");
}

#[test]
fn a_difference_that_comes_back_is_made_small() {
    let (tally, text) = campaign(Lie::Never, Lie::Always);
    assert_eq!(tally.diverging.values().sum::<u64>(), 1);
    assert!(!text.contains("times again"), "{text}");
    assert!(!text.contains("ymm9"), "{text}");
}
