//! What tests run inside a guest: each subcommand strains one part of the machine, checks the
//! results itself, and prints one line.
//!
//! `fourfold`'s tests link it statically and put it into the guest with `run --file`. It runs on any
//! Linux, so a failure can be told from a mistake of the test's by running it on the host.
//!
//! | subcommand | what it strains |
//! |---|---|
//! | `memory PERCENT` | random patterns over that share of the available memory, from all CPUs |
//! | `processes ROUNDS` | fork, exec, pipes, threads with futexes, signals |
//! | `files MIB` | a tree of files, mapped files, holes, the page cache |
//! | `registers MS` | x87, SSE and AVX registers of many threads across context switches |
//! | `timers` | sleeps, periodic timers, clocks on all CPUs |
//! | `install DIR PACKAGES` | what a package manager does: write, fsync, rename, a database |
//! | `journal DIR` | numbered files, each announced when it is on the disk, until killed |
//! | `journal-check DIR LAST` | whether all of them are there |

mod files;
mod install;
mod journal;
mod memory;
mod processes;
mod random;
mod registers;
mod timers;

use std::env;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["memory", percent] => memory::run(number(percent)?),
        ["processes", rounds] => processes::run(number(rounds)?),
        ["processes-child", text] => {
            processes::child(text);
            Ok(())
        }
        ["files", mib] => files::run(number(mib)?),
        ["registers", milliseconds] => registers::run(number(milliseconds)?),
        ["timers"] => timers::run(),
        ["install", directory, packages] => install::run(directory.as_ref(), number(packages)?),
        ["journal", directory] => journal::write(directory.as_ref()),
        ["journal-check", directory, last] => journal::check(directory.as_ref(), number(last)?),
        _ => bail!("what? {words:?}"),
    }
}

fn number(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("{text} is no number"))
}

/// How many CPUs this process may use.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}
