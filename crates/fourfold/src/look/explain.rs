//! `fourfold explain`: the whole way of one address.

use anyhow::Result;
use clap::{Args, ValueEnum};
use control::ExplainQuery;
use explain::Chain;

use super::{machine, print_json, say};
use crate::ending::Ending;

const EXAMPLES: &str = "\
Examples:
  fourfold explain vm gva:0xffffffff81000000
  fourfold explain vm gva:0x7ffc00001000 --access write --user
  fourfold explain vm gpa:0xfee00000
  fourfold explain vm hva:0x7f3000001000     also: which guest mappings lead there
  fourfold explain vm hpa:0x12345000 --json";

/// Options of `explain`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExplainOptions {
    /// The machine's name, as `fourfold ps` lists it
    name: String,
    /// The address: gva:0x…, gpa:0x…, hva:0x… or hpa:0x…
    address: String,
    /// Whose registers and TLB
    #[arg(long, value_name = "N", default_value_t = 0)]
    vcpu: u32,
    /// Another address space than the one that the vCPU has loaded, in hexadecimal
    #[arg(long, value_name = "CR3")]
    cr3: Option<String>,
    /// What is to be done there
    #[arg(long, value_enum, default_value_t = Kind::Read)]
    access: Kind,
    /// On behalf of user mode (CPL 3); without it, of the guest's kernel
    #[arg(long)]
    user: bool,
    /// Also search the guest's tables for all other mappings of the place
    #[arg(long)]
    backwards: bool,
    /// Print the answer as JSON: the API's `Chain`
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Read,
    Write,
    Exec,
}

/// Asks and prints.
pub(crate) fn run(options: &ExplainOptions) -> Result<Ending> {
    let query = ExplainQuery {
        address: options.address.clone(),
        vcpu: Some(options.vcpu),
        cr3: options.cr3.clone(),
        access: Some(
            match options.access {
                Kind::Read => "read",
                Kind::Write => "write",
                Kind::Exec => "exec",
            }
            .to_owned(),
        ),
        privilege: options.user.then(|| "user".to_owned()),
        search: options.backwards.then(|| "whole".to_owned()),
    };
    let chain: Chain = machine(&options.name)?.get("/explain", &query)?;
    if options.json {
        print_json(&chain)?;
    } else {
        say(&chain.to_string())?;
    }
    Ok(Ending::Done)
}
