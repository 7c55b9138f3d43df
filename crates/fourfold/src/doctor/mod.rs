//! `fourfold doctor`: what this host offers, what Fourfold will therefore use, and how to change
//! what is missing.

mod host;
mod report;

use accel::{
    Preference, choose,
    detect::{KernelKvm, UserSupport},
};
use anyhow::Result;

use crate::{cli::DoctorOptions, ending::Ending};
use report::Report;
#[cfg(test)]
use report::Standing;

/// Looks and prints.
pub(crate) fn run(options: &DoctorOptions) -> Result<Ending> {
    let report = examine();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(if report.accelerator.is_some() {
        Ending::Done
    } else {
        Ending::HostLacks("no accelerator works here; the findings above say why".to_owned())
    })
}

fn examine() -> Report {
    let mut findings = vec![host::kernel_kvm(&KernelKvm::probe())];
    findings.extend(UserSupport::probe().needs.iter().map(host::need));
    findings.extend([
        host::pagemap(),
        host::userfaultfd(),
        host::huge_pages(),
        host::transparent_huge_pages(),
        host::cpu_features(),
        host::package_tools(),
    ]);
    let (accelerator, why) = match choose(Preference::Auto) {
        Ok(chosen) => (Some(chosen.accelerator.kind().to_string()), chosen.reason),
        Err(error) => (None, error.to_string()),
    };
    Report {
        findings,
        accelerator,
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_thing_says_how_to_change_it() {
        let report = examine();
        print!("{report}");
        for finding in &report.findings {
            let lacking = finding.standing == Standing::Missing;
            assert!(!lacking || finding.remedy.is_some(), "{finding:?}");
        }
        assert!(report.findings.len() >= 8);
    }
}
