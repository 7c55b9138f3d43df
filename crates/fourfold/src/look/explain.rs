//! `fourfold explain`: the whole way of one address.

use std::path::PathBuf;

use addr::Gva;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use control::ExplainQuery;
use explain::{Chain, Search, Target, parse_hex, qemu::Qemu, symbols::Symbols};
use mmu::{Access, AccessKind, Privilege};

use super::{
    machine, name_of,
    names::{address, symbols},
    print_json, say,
};
use crate::ending::Ending;

const EXAMPLES: &str = "\
Examples:
  fourfold explain vm linux_banner
  fourfold explain vm gva:0xffffffff81000000
  fourfold explain vm gva:0x7ffc00001000 --access write --user
  fourfold explain vm gpa:0xfee00000
  fourfold explain vm hva:0x7f3000001000     also: which guest mappings lead there
  fourfold explain vm hpa:0x12345000 --json
  fourfold explain --pid 1234 gva:0xffffffff81000000     a program under `fourfold exec`, or a QEMU";

/// Options of `explain`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ExplainOptions {
    /// The machine's name, as `fourfold ps` lists it; not with --pid
    #[arg(value_name = "NAME")]
    first: String,
    /// The address: gva:0x…, gpa:0x…, hva:0x…, hpa:0x…, or a symbol of the guest's kernel, as
    /// `linux_banner` or `start_kernel+0x10`
    #[arg(value_name = "ADDRESS")]
    second: Option<String>,
    /// A process instead of a name: of `fourfold run`, a program under `fourfold exec`, or a QEMU
    /// of its own
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// QEMU's QMP socket [default: the one that its command line names]
    #[arg(long, value_name = "PATH", requires = "pid")]
    qmp: Option<PathBuf>,
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
    /// Take symbols from this System.map, vmlinux or kernel image; `kernel` stands for the kernel
    /// that the machine booted [default for a symbol: kernel]
    #[arg(long, value_name = "FILE")]
    symbols: Option<PathBuf>,
    /// Print the answer as JSON: the API's `Chain`
    #[arg(long)]
    json: bool,
}

/// AC of RFLAGS.
const ALIGNMENT_CHECK: u64 = 1 << 18;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    Read,
    Write,
    Exec,
}

/// Asks and prints.
pub(crate) fn run(options: &ExplainOptions) -> Result<Ending> {
    let chain = match options.pid {
        Some(pid) => of_process(options, pid)?,
        None => of_ours(options)?,
    };
    if options.json {
        print_json(&chain)?;
    } else {
        say(&chain.to_string())?;
    }
    Ok(Ending::Done)
}

/// A machine of ours in that process, or one of QEMU's. With `--qmp` it is QEMU that is asked, even
/// if its KVM is ours.
fn of_process(options: &ExplainOptions, pid: u32) -> Result<Chain> {
    if let Some(second) = &options.second {
        bail!(
            "--pid names the machine: leave {:?} or {second:?} out",
            options.first
        );
    }
    match name_of(pid)? {
        Some(name) if options.qmp.is_none() => ask(options, &name, &options.first),
        _ => of_qemu(options, pid),
    }
}

/// A machine of QEMU's.
fn of_qemu(options: &ExplainOptions, pid: u32) -> Result<Chain> {
    let mut qemu = Qemu::open(pid, options.qmp.as_deref())?;
    let cr3 = match &options.cr3 {
        Some(text) => Some(parse_hex(text).with_context(|| format!("--cr3 {text}"))?),
        None => None,
    };
    let is_address = options.first.parse::<Target>();
    let symbols = match (&options.symbols, &is_address) {
        (None, Ok(_)) => None,
        (None, Err(_)) => bail!("a symbol of a machine of QEMU's needs --symbols FILE"),
        (Some(path), _) => Some(Symbols::load(path)?),
    };
    let target = match (is_address, &symbols) {
        (Ok(target), _) => target,
        (Err(_), Some(symbols)) => Target::Gva(Gva::new(address(symbols, &options.first)?)),
        (Err(error), None) => return Err(error.into()),
    };
    let registers = qemu.registers(options.vcpu)?;
    let privilege = match (options.user, registers.rflags & ALIGNMENT_CHECK) {
        (true, _) => Privilege::User,
        (false, 0) => Privilege::Supervisor,
        (false, _) => Privilege::SupervisorAcSet,
    };
    let kind = match options.access {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Exec => AccessKind::Execute,
    };
    let search = match (options.backwards, target) {
        (true, _) | (_, Target::Hva(_) | Target::Hpa(_)) => Search::Whole,
        _ => Search::No,
    };
    let access = Access::new(kind, privilege);
    let mut chain = qemu.explain(target, access, search, options.vcpu, cr3)?;
    name(&mut chain, symbols.as_ref());
    Ok(chain)
}

/// A machine of ours.
fn of_ours(options: &ExplainOptions) -> Result<Chain> {
    let Some(asked) = &options.second else {
        bail!(
            "{:?}: give the machine's name and an address, as in `fourfold explain NAME gva:0x…`",
            options.first
        );
    };
    ask(options, &options.first, asked)
}

fn ask(options: &ExplainOptions, machine_name: &str, asked: &str) -> Result<Chain> {
    let client = machine(machine_name)?;
    let is_address = asked.parse::<Target>().is_ok();
    let symbols = match (&options.symbols, is_address) {
        (None, true) => None,
        (given, _) => Some(symbols(&client, given.as_deref())?),
    };
    let address = match &symbols {
        Some(symbols) if !is_address => {
            format!("gva:{:#x}", address(symbols, asked)?)
        }
        _ => asked.to_owned(),
    };
    let query = ExplainQuery {
        address,
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
    let mut chain: Chain = client.get("/explain", &query)?;
    name(&mut chain, symbols.as_ref());
    Ok(chain)
}

/// Names the symbol that holds the address.
fn name(chain: &mut Chain, symbols: Option<&Symbols>) {
    let found = symbols
        .zip(chain.gva)
        .and_then(|(symbols, gva)| symbols.find(gva.raw()));
    chain.symbol = found.map(|(name, offset)| format!("{name}+{offset:#x}"));
}
