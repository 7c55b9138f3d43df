//! The Linux kernel's own KVM selftests, unmodified, on our KVM and on the kernel's.
//!
//! `cargo xtask selftests` builds them from Debian's package linux-source-6.12 and runs each as a
//! user would: `fourfold exec -- TEST` for ours, `TEST` itself for `/dev/kvm`.

mod build;
mod list;
mod report;
mod run;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

pub(crate) use build::fourfold;

/// What to run, and on what.
#[derive(Args)]
pub(crate) struct Options {
    /// Only tests whose names contain one of these
    names: Vec<String>,
    /// Only the core set, which the gate runs
    #[arg(long)]
    core: bool,
    /// Seconds that one test may take
    #[arg(long, default_value_t = 40)]
    limit: u64,
    /// Which KVM to run them on
    #[arg(long, value_enum, default_value_t = On::Both)]
    on: On,
    /// The kernel's source: an archive or an unpacked tree
    #[arg(long, default_value = "/usr/src/linux-source-6.12.tar.xz")]
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
    let fourfold = build::fourfold()?;
    let folder = build::selftests(&options.source)?;
    let tests = list::choose(&folder, &options.names, options.core)?;
    let limit = Duration::from_secs(options.limit);
    let kernel = options.on != On::User && kernel_kvm_opens();
    let mut rows = Vec::new();
    for test in tests {
        let user = (options.on != On::Kvm)
            .then(|| run::on_user(&fourfold, &folder, &test, limit))
            .transpose()?;
        let kvm = kernel
            .then(|| run::on_kernel(&folder, &test, limit))
            .transpose()?;
        let row = report::Row { test, user, kvm };
        println!("{row}");
        rows.push(row);
    }
    report::summary(&rows);
    let bad = rows.iter().filter(|r| r.is_failure()).count();
    if bad > 0 {
        bail!("{bad} tests failed or timed out on user, or skipped without a listed reason");
    }
    Ok(())
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
