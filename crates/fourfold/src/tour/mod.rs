//! `fourfold tour`: who turns a guest's address into a place in this machine's memory, shown on a
//! running guest.

mod guest;
mod stage;
mod story;
mod text;

use accel::{Kind, Preference, choose};
use anyhow::Result;
use clap::{Args, ValueEnum};
use mmu::PagingPath;
use serde::Serialize;

use crate::ending::Ending;
use story::{Story, tell};

/// Options of `tour`.
#[derive(Debug, Args)]
pub(crate) struct TourOptions {
    /// On which KVM: ours in user space, which shows everything, or the kernel's
    #[arg(long, value_enum, default_value_t = Accel::User)]
    accel: Accel,
    /// Print everything that was measured as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Accel {
    User,
    Kvm,
}

/// The tour: the story on the first path, then the others to compare.
#[derive(Debug, Serialize)]
struct Tour {
    accelerator: String,
    why: String,
    story: Story,
    others: Vec<Story>,
}

/// Runs the guest and tells what happened.
pub(crate) fn run(options: &TourOptions) -> Result<Ending> {
    let tour = match options.accel {
        Accel::User => on_user()?,
        Accel::Kvm => on_kernel()?,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&tour)?);
    } else {
        print!("{tour}");
    }
    Ok(Ending::Done)
}

fn on_user() -> Result<Tour> {
    let told = |paging: PagingPath| -> Result<Story> {
        let chosen = choose(Preference::User(paging.into()))?;
        tell(&*chosen.accelerator, Some(paging))
    };
    Ok(Tour {
        accelerator: Kind::User.to_string(),
        why: "our KVM in user space: it can show its own tables".to_owned(),
        story: told(PagingPath::Nested)?,
        others: vec![told(PagingPath::Shadow)?, told(PagingPath::Direct)?],
    })
}

fn on_kernel() -> Result<Tour> {
    let chosen = choose(Preference::Kernel)?;
    Ok(Tour {
        accelerator: Kind::Kernel.to_string(),
        why: chosen.reason,
        story: tell(&*chosen.accelerator, None)?,
        others: Vec::new(),
    })
}
