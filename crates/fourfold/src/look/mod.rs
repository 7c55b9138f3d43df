//! The commands that look at machines which run: `ps`, `explain`, `map`, `faults`, `pause`, `resume`, `stop`.
//!
//! Each is one request to a machine's control API, and its answer as text or as JSON.

pub(crate) mod explain;
pub(crate) mod faults;
pub(crate) mod map;
mod names;
pub(crate) mod power;
pub(crate) mod ps;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use control::{Client, Directory, State, Status};
use serde::Serialize;

use crate::ending::Ending;

/// Which machine: of `fourfold run`, or a program under `fourfold exec`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Which {
    /// The machine's name, as `fourfold ps` lists it
    #[arg(required_unless_present = "pid")]
    name: Option<String>,
    /// The machine that this process runs, instead of a name
    #[arg(long, value_name = "PID", conflicts_with = "name")]
    pid: Option<u32>,
}

impl Which {
    /// Its name.
    fn name(&self) -> Result<String> {
        match (&self.name, self.pid) {
            (Some(name), _) => Ok(name.clone()),
            (None, Some(pid)) => name_of(pid)?.with_context(|| {
                format!(
                    "process {pid} runs no machine that can be reached: `fourfold run` and \
                     `fourfold exec` make such, `fourfold ps` lists them"
                )
            }),
            (None, None) => bail!("give a machine's name, or --pid"),
        }
    }
}

/// The name of the machine that a process runs, if it runs one that can be reached.
fn name_of(pid: u32) -> Result<Option<String>> {
    Ok(Directory::of_user()?.name_of(pid)?)
}

/// A connection to the machine of this name.
fn machine(name: &str) -> Result<Client> {
    const PATIENCE: Duration = Duration::from_secs(20);
    let client = connect(name)?;
    // A machine that is being built has nothing to show yet.
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let status: Status = client.get("/status", &())?;
        if status.state != State::Starting {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(client)
}

/// A connection to the machine of this name, whatever its state.
fn connect(name: &str) -> Result<Client> {
    let socket = Directory::of_user()?.find(name)?;
    Ok(Client::new(&socket)?)
}

/// Prints an answer as JSON.
fn print_json(answer: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(answer).context("writing JSON")?;
    say(&format!("{text}\n"))
}

/// Writes to standard output; a reader that has gone is no error.
fn say(text: &str) -> Result<()> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("writing the answer")
        }
        _ => Ok(()),
    }
}

/// `fourfold openapi`.
pub(crate) fn openapi() -> Result<Ending> {
    print_json(&control::document())?;
    Ok(Ending::Done)
}
