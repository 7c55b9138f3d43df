//! `fourfold pause`, `resume`, `stop`.

use anyhow::Result;
use clap::Args;
use control::{StateAnswer, Status};

use super::{Which, machine, print_json, say};
use crate::ending::Ending;

/// Which machine.
#[derive(Debug, Args)]
pub(crate) struct PowerOptions {
    #[command(flatten)]
    which: Which,
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
    let name = options.which.name()?;
    let answer: StateAnswer = machine(&name)?.post(path)?;
    if options.json {
        print_json(&answer)?;
    } else {
        say(&format!(
            "{name}: {what}, after {:.2} ms\n",
            answer.milliseconds
        ))?;
    }
    Ok(Ending::Done)
}

/// `fourfold stop`.
pub(crate) fn stop(options: &PowerOptions) -> Result<Ending> {
    let name = options.which.name()?;
    let answer: Status = machine(&name)?.post("/stop")?;
    if options.json {
        print_json(&answer)?;
    } else {
        say(&format!("{name}: stopped\n"))?;
    }
    Ok(Ending::Done)
}

/// Lets a machine go on, for another command.
pub(super) fn go_on(name: &str) -> Result<()> {
    let _: StateAnswer = machine(name)?.post("/resume")?;
    Ok(())
}
