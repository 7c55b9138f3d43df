//! `fourfold pause`, `resume`, `stop`.

use anyhow::Result;
use clap::Args;
use control::{StateAnswer, Status};

use super::{machine, print_json, say};
use crate::ending::Ending;

/// Which machine.
#[derive(Debug, Args)]
pub(crate) struct PowerOptions {
    /// The machine's name, as `fourfold ps` lists it
    name: String,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

/// `fourfold pause`.
pub(crate) fn pause(options: &PowerOptions) -> Result<Ending> {
    set(options, "/pause", "stopped")
}

/// `fourfold resume`.
pub(crate) fn resume(options: &PowerOptions) -> Result<Ending> {
    set(options, "/resume", "running again")
}

fn set(options: &PowerOptions, path: &str, what: &str) -> Result<Ending> {
    let answer: StateAnswer = machine(&options.name)?.post(path)?;
    if options.json {
        print_json(&answer)?;
    } else {
        say(&format!(
            "{}: {what}, after {:.2} ms\n",
            options.name, answer.milliseconds
        ))?;
    }
    Ok(Ending::Done)
}

/// `fourfold stop`.
pub(crate) fn stop(options: &PowerOptions) -> Result<Ending> {
    let answer: Status = machine(&options.name)?.post("/stop")?;
    if options.json {
        print_json(&answer)?;
    } else {
        say(&format!("{}: stopped\n", options.name))?;
    }
    Ok(Ending::Done)
}

/// Lets a machine go on, for another command.
pub(super) fn go_on(name: &str) -> Result<()> {
    let _: StateAnswer = machine(name)?.post("/resume")?;
    Ok(())
}
