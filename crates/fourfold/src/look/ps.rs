//! `fourfold ps`: which machines run.

use std::fmt::Write;

use anyhow::Result;
use clap::Args;
use control::{Directory, Status};

use super::{connect, print_json, say};
use crate::ending::Ending;

/// Options of `ps`.
#[derive(Debug, Args)]
pub(crate) struct PsOptions {
    /// Print the list as JSON: an array of the API's `Status`
    #[arg(long)]
    json: bool,
}

/// Lists them.
pub(crate) fn run(options: &PsOptions) -> Result<Ending> {
    let names = Directory::of_user()?.names()?;
    // One that ends while it is asked is not in the list.
    let machines: Vec<Status> = names
        .iter()
        .filter_map(|name| connect(name).ok()?.get("/status", &()).ok())
        .collect();
    if options.json {
        print_json(&machines)?;
    } else {
        say(&table(&machines))?;
    }
    Ok(Ending::Done)
}

fn table(machines: &[Status]) -> String {
    if machines.is_empty() {
        return "no machine runs; `fourfold run --name NAME` starts one\n".to_owned();
    }
    let width = machines
        .iter()
        .map(|m| m.name.len())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut text = format!(
        "{:width$}  {:>7}  {:8}  {:12}  {:>5}  {:>9}  {:>8}\n",
        "NAME", "PID", "STATE", "ACCELERATOR", "VCPUS", "MEMORY", "UP"
    );
    for m in machines {
        let accelerator = match &m.paging {
            Some(paging) => format!("{} {paging}", m.accelerator),
            None => m.accelerator.clone(),
        };
        let state = format!("{:?}", m.state).to_lowercase();
        let _ = writeln!(
            text,
            "{:width$}  {:>7}  {state:8}  {accelerator:12}  {:>5}  {:>5} MiB  {:>8}",
            m.name,
            m.pid,
            m.cpus,
            m.memory_bytes >> 20,
            up(m.uptime_seconds)
        );
    }
    text
}

fn up(seconds: f64) -> String {
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{}m {}s", whole / 60, whole % 60),
        _ => format!("{}h {}m", whole / 3600, whole / 60 % 60),
    }
}
