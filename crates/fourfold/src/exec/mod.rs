//! `fourfold exec`: runs an unmodified program with our KVM as its `/dev/kvm`.

mod library;
mod program;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};

use crate::ending::Ending;

/// Options of `exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecOptions {
    /// Whose KVM the program gets: ours in user space, or the kernel's (to trace it)
    #[arg(long, value_enum, default_value_t = Accel::User)]
    accel: Accel,
    /// How our KVM goes from guest virtual addresses to host ones
    #[arg(long, value_enum, default_value_t = Paging::Nested)]
    paging: Paging,
    /// Print each KVM call of the program, decoded, on standard error
    #[arg(long)]
    trace: bool,
    /// Print how often each KVM call was made, and how long it took, when the program ends
    #[arg(long)]
    stats: bool,
    /// Leave out seccomp filters of the program that would forbid what our KVM needs
    #[arg(long)]
    ignore_seccomp: bool,
    /// Make no control socket: the program is not found by `fourfold ps`, and `explain`, `map`,
    /// `faults` and `pause` do not reach it
    #[arg(long)]
    private: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Accel {
    User,
    Kvm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Paging {
    Nested,
    Shadow,
    Direct,
}

/// Becomes the program; returns only where it can't.
pub(crate) fn run(options: &ExecOptions) -> Result<Ending> {
    let Some((name, arguments)) = options.command.split_first() else {
        return Err(anyhow!("no program given"));
    };
    let program = program::find(name)?;
    program::check(&program)?;
    let library = library::find()?;
    let error = Command::new(&program)
        .arg0(name)
        .args(arguments)
        .env("LD_PRELOAD", library::preload_list(&library))
        .env("FOURFOLD_EXEC", settings(options))
        .exec();
    Err(anyhow!("can't execute {}: {error}", program.display()))
}

/// The options in the one string that the library reads at its start: `LD_PRELOAD` leaves no other
/// way to hand them over.
fn settings(options: &ExecOptions) -> String {
    let mut words = vec![
        match options.accel {
            Accel::User => "accel=user",
            Accel::Kvm => "accel=kvm",
        },
        match options.paging {
            Paging::Nested => "paging=nested",
            Paging::Shadow => "paging=shadow",
            Paging::Direct => "paging=direct",
        },
    ];
    if options.trace {
        words.push("trace");
    }
    if options.stats {
        words.push("stats");
    }
    if options.private {
        words.push("private");
    }
    if options.ignore_seccomp {
        words.push("ignore-seccomp");
    }
    words.join(",")
}
