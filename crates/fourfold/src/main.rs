//! Run x86-64 virtual machines and see how guest addresses become host pages.

mod cli;
mod doctor;
mod ending;
mod exec;
mod heap;
mod look;
mod run;
mod tour;

use clap::Parser;

use cli::{Cli, Command};
use ending::Ending;

fn main() -> std::process::ExitCode {
    heap::keep_large_blocks_apart();
    let ending = match Cli::parse().command {
        Command::Run(options) => run::run(*options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Exec(options) => exec::run(&options),
        Command::Tour(options) => tour::run(&options),
        Command::Ps(options) => look::ps::run(&options),
        Command::Explain(options) => look::explain::run(&options),
        Command::Map(options) => look::map::run(&options),
        Command::Faults(options) => look::faults::run(&options),
        Command::Pause(options) => look::power::pause(&options),
        Command::Resume(options) => look::power::resume(&options),
        Command::Stop(options) => look::power::stop(&options),
        Command::Openapi => look::openapi(),
        Command::Completions { shell } => Ok(cli::completions(shell)),
        Command::Man => cli::manual(),
    };
    ending
        .unwrap_or_else(|error| Ending::of_error(&error))
        .report()
}
