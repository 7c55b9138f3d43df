//! How the command ends: stable exit codes, and errors that are readable.
//!
//! | code | meaning                                                              |
//! |------|----------------------------------------------------------------------|
//! | 0    | done                                                                 |
//! | 1    | the operation failed; the message says which, where and why          |
//! | 2    | the command line is wrong                                            |
//! | 3    | this host can't do it (`fourfold doctor` says what is missing)       |
//!
//! `fourfold run --exec` ends with the guest command's own code, and with 125 where the command
//! could not be run at all. With `--timeout` both kinds of `run` end with 124 when the time is over,
//! as `timeout` does.

use std::process::ExitCode;

use anyhow::Error;

/// The exit codes as shown below `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the operation failed
  2  the command line is wrong
  3  this host can't do it; `fourfold doctor` says what is missing
`fourfold run --exec` ends with the command's own code, or with 125 where it could not be run.
`fourfold run --timeout` ends with 124 when the time is over.";

/// How it ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// As asked.
    Done,
    /// Not as asked.
    Failed(String),
    /// Not possible on this host.
    HostLacks(String),
    /// A command in the guest ended with this code.
    Command(u8),
    /// A command could not be run in the guest.
    CommandNotRun(String),
    /// The time that `--timeout` gave was over first.
    TimeOver(String),
}

impl Ending {
    /// The ending for an error with its chain of causes.
    pub(crate) fn of_error(error: &Error) -> Self {
        let message = format!("{error:#}");
        if error.downcast_ref::<accel::Refused>().is_some() {
            Self::HostLacks(message)
        } else {
            Self::Failed(message)
        }
    }

    /// Whether it ended as one hopes.
    pub(crate) fn is_success(&self) -> bool {
        matches!(self, Self::Done | Self::Command(0))
    }

    /// Whether the operation was tried, and failed.
    pub(crate) fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_))
    }

    /// Prints what there is to say and gives the process's exit code.
    pub(crate) fn report(self) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            Self::Failed(message) => fail(&message, 1),
            Self::HostLacks(message) => fail(&message, 3),
            Self::Command(code) => ExitCode::from(code),
            Self::CommandNotRun(message) => fail(&message, 125),
            Self::TimeOver(message) => fail(&message, 124),
        }
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("fourfold: {message}");
    ExitCode::from(code)
}
