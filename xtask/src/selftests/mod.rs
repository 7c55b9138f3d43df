//! The Linux kernel's own KVM selftests, unmodified, on our KVM and on the kernel's.
//!
//! `cargo xtask selftests` builds them from Debian's package linux-source-6.12 and runs each as a
//! user would: `fourfold exec -- TEST` for ours, `TEST` itself for `/dev/kvm`.

mod build;
mod compare;
mod huge;
mod list;
mod report;
mod run;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

pub(crate) use build::fourfold;
use huge::HugePages;
use list::Set;

/// What to run, and on what.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain one of these
    names: Vec<String>,
    /// Only the core set, which the gate runs
    #[arg(long)]
    core: bool,
    /// Only the tests that measure, on both KVMs alternating, with ratios
    #[arg(long)]
    compare: bool,
    /// How many times each runs for --compare; medians are printed
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds that one test may take (a few listed ones get more)
    #[arg(long, default_value_t = 40)]
    limit: u64,
    /// Which KVM to run them on
    #[arg(long, value_enum, default_value_t = On::Both)]
    on: On,
    /// The kernel's source: an archive or an unpacked tree
    #[arg(long, default_value = build::SOURCE)]
    source: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum On {
    User,
    Kvm,
    Both,
}

/// Builds and runs the tests; an error where one fails or times out on our KVM.
pub(crate) fn main(options: &Options) -> Result<()> {
    let set = if options.core { Set::Core } else { Set::All };
    let fourfold = build::fourfold()?;
    let folder = build::selftests(&options.source, set)?;
    let limit = Duration::from_secs(options.limit);
    if options.compare {
        let rounds = options.rounds.max(1);
        return compare::main(&fourfold, &folder, &options.names, rounds, limit);
    }
    let cases = list::choose(&folder, &options.names, set)?;
    let kernel = options.on != On::User && kernel_kvm_opens();
    let mut report = report::Report::new(cases.len());
    for case in cases {
        if case.processors() > std::thread::available_parallelism()?.get() {
            report.leave_out(&case);
            continue;
        }
        let _huge = (case.test == "x86_64/dirty_log_page_splitting_test").then(HugePages::reserve);
        let user = (options.on != On::Kvm)
            .then(|| run::on_user(&fourfold, &folder, &case, limit))
            .transpose()?;
        let kvm = (kernel && case.options.is_empty())
            .then(|| run::on_kernel(&folder, &case, limit))
            .transpose()?;
        report.add(report::Row { case, user, kvm });
    }
    let bad = report.finish(&run::logs()?.join("report.txt"))?;
    if bad > 0 {
        bail!("{bad} tests failed or timed out on user, or skipped without a listed reason");
    }
    Ok(())
}

/// The core set on our KVM, for the gate; says so where it can't be built.
pub(crate) fn core() -> Result<()> {
    let source = PathBuf::from(build::SOURCE);
    if !source.exists() {
        println!(
            "SKIPPED: the kernel's KVM selftests: no {} (apt-get install linux-source-6.12)",
            source.display()
        );
        return Ok(());
    }
    if let Some(tool) = ["make", "rsync", "cc"].into_iter().find(|t| !is_there(t)) {
        println!("SKIPPED: the kernel's KVM selftests: building them takes {tool}");
        return Ok(());
    }
    main(&Options {
        names: Vec::new(),
        core: true,
        compare: false,
        rounds: 1,
        limit: 40,
        on: On::User,
        source,
    })
}

fn is_there(tool: &str) -> bool {
    Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok()
}

fn kernel_kvm_opens() -> bool {
    let opens = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = &opens {
        println!("not run on the kernel's KVM: /dev/kvm: {error}");
    }
    opens.is_ok()
}
