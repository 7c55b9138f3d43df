//! The command line.

use std::io;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::ending::{EXIT_CODES, Ending};
use crate::exec::ExecOptions;
use crate::look::{
    explain::ExplainOptions, faults::FaultsOptions, map::MapOptions, power::PowerOptions,
    ps::PsOptions,
};
use crate::run::RunOptions;
use crate::tour::TourOptions;

/// Run x86-64 virtual machines, with or without /dev/kvm, and see how every address that a guest
/// uses becomes a place in the host's memory.
#[derive(Debug, Parser)]
#[command(name = "fourfold", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a virtual machine: by default Debian's cloud kernel with a shell on this terminal
    Run(Box<RunOptions>),
    /// Say what this host offers, what Fourfold will use, and how to change what is missing
    Doctor(DoctorOptions),
    /// Run an unmodified program with our KVM as its /dev/kvm
    Exec(ExecOptions),
    /// See, on a guest that runs now, how its addresses become places in this machine's memory
    Tour(TourOptions),
    /// List the machines that run now
    Ps(PsOptions),
    /// Explain the whole way of one address of a running machine, through all four spaces
    Explain(ExplainOptions),
    /// Show all of a machine's memory: what is mapped, and what the host really holds
    Map(MapOptions),
    /// Watch the faults of a machine's memory as they happen
    Faults(FaultsOptions),
    /// Stop a machine's vCPUs between two instructions
    Pause(PowerOptions),
    /// Let a paused machine's vCPUs go on
    Resume(PowerOptions),
    /// End a machine, as pulling the plug would
    Stop(PowerOptions),
    /// Write the description of the control API (an `OpenAPI` document) to standard output
    Openapi,
    /// Write a completion script for a shell to standard output
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual page to standard output
    #[command(hide = true)]
    Man,
}

/// Options of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorOptions {
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `fourfold completions SHELL`.
pub(crate) fn completions(shell: Shell) -> Ending {
    clap_complete::generate(shell, &mut Cli::command(), "fourfold", &mut io::stdout());
    Ending::Done
}

/// `fourfold man`: the command's page, then one section for each visible subcommand.
pub(crate) fn manual() -> Result<Ending> {
    let command = Cli::command();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    for subcommand in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        let man = clap_mangen::Man::new(subcommand.clone());
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
    }
    io::Write::write_all(&mut io::stdout(), &page).context("writing the manual page")?;
    Ok(Ending::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
