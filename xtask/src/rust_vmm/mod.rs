//! The tests and examples of the crates kvm-ioctls and vmm-sys-util, unmodified, on our KVM:
//! `fourfold exec` stands in for `/dev/kvm`.
//!
//! What fails is run on the kernel's KVM of this machine, too, where it opens, and the reason is said.

mod expected;
mod suite;

use std::path::Path;

use anyhow::{Result, bail};

use crate::selftests::fourfold;
use suite::{On, Suite};

const CRATES: [&str; 2] = ["kvm-ioctls", "vmm-sys-util"];

/// What came of a crate.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    surprises: Vec<String>,
}

/// Builds and runs them; an error where one fails that is not expected to.
pub(crate) fn main() -> Result<()> {
    let fourfold = fourfold()?;
    let mut surprises = Vec::new();
    for name in CRATES {
        let suite = Suite::build(name)?;
        let mut tally = tests(&suite, &fourfold)?;
        report(name, "tests", &tally);
        surprises.append(&mut tally.surprises);
        let mut tally = examples(&suite, &fourfold)?;
        report(name, "examples", &tally);
        surprises.append(&mut tally.surprises);
    }
    if !surprises.is_empty() {
        bail!("not expected to fail:\n  {}", surprises.join("\n  "));
    }
    Ok(())
}

fn report(name: &str, what: &str, tally: &Tally) {
    println!(
        "{name}: {} {what} pass, {} fail as expected, {} fail otherwise",
        tally.passed,
        tally.failed,
        tally.surprises.len()
    );
}

fn tests(suite: &Suite, fourfold: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    for test in suite.names()? {
        let reason = expected::reason(suite.name, &test);
        if suite.passes(&test, On::User(fourfold))? {
            tally.passed += 1;
            if let Some(reason) = reason {
                println!("{test} passes on this machine (elsewhere: {reason})");
            }
            continue;
        }
        let there = kernel(suite, &test)?;
        match reason {
            Some(reason) => {
                tally.failed += 1;
                println!("{test} fails: {reason}; on /dev/kvm it {there}");
            }
            None => tally
                .surprises
                .push(format!("{test}; on /dev/kvm it {there}")),
        }
    }
    Ok(tally)
}

fn kernel(suite: &Suite, test: &str) -> Result<&'static str> {
    if std::fs::File::open("/dev/kvm").is_err() {
        return Ok("can't be run here");
    }
    Ok(if suite.passes(test, On::Kernel)? {
        "passes"
    } else {
        "fails, too"
    })
}

fn examples(suite: &Suite, fourfold: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let results = suite.examples(On::User(fourfold))?;
    let failed = results.iter().any(|(_, passes)| !passes);
    let there = if failed {
        examples_of_the_kernel(suite)?
    } else {
        Vec::new()
    };
    for (name, passes) in results {
        if passes {
            tally.passed += 1;
            continue;
        }
        let there = match there.iter().find(|(other, _)| *other == name) {
            Some((_, true)) => "passes",
            Some((_, false)) => "fails, too",
            None => "can't be run here",
        };
        match expected::reason(suite.name, &name) {
            Some(reason) => {
                tally.failed += 1;
                println!("{name} fails: {reason}; on /dev/kvm it {there}");
            }
            None => tally
                .surprises
                .push(format!("{name}; on /dev/kvm it {there}")),
        }
    }
    Ok(tally)
}

/// The same examples on `/dev/kvm`; none where it doesn't open.
fn examples_of_the_kernel(suite: &Suite) -> Result<Vec<(String, bool)>> {
    if std::fs::File::open("/dev/kvm").is_err() {
        return Ok(Vec::new());
    }
    suite.examples(On::Kernel)
}
