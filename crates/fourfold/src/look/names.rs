//! Symbols of a running guest's kernel.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use control::{Client, MemoryQuery, RegistersAnswer, Status, VcpuQuery};
use explain::{parse_hex, symbols::Symbols};

/// The word that stands for the kernel that the machine booted.
const OWN_KERNEL: &str = "kernel";

/// What the user said about symbols, loaded, and moved to where the guest's kernel is now.
pub(super) fn symbols(client: &Client, given: Option<&Path>) -> Result<Symbols> {
    let path = match given {
        Some(path) if path != Path::new(OWN_KERNEL) => path.to_owned(),
        _ => {
            let status: Status = client.get("/status", &())?;
            let kernel = status.kernel.map(PathBuf::from);
            kernel
                .context("the machine does not say which kernel it booted: give --symbols FILE")?
        }
    };
    let symbols = Symbols::load(&path)?;
    Ok(match page_fault_handler(client) {
        Some(handler) => symbols.moved(handler),
        // No kernel runs yet: symbols are where they were linked.
        None => symbols,
    })
}

/// Where the guest's IDT sends page faults (SDM 3A, 6.14.1).
fn page_fault_handler(client: &Client) -> Option<u64> {
    const GATE: u64 = 14 * 16;
    let registers: RegistersAnswer = client.get("/registers", &VcpuQuery::default()).ok()?;
    let idt = parse_hex(&registers.segments.get("idt")?.base)?;
    let query = MemoryQuery {
        address: format!("gva:{:#x}", idt.wrapping_add(GATE)),
        bytes: 16,
        vcpu: None,
    };
    let gate = client.get_bytes("/memory", &query).ok()?;
    let word = |at: usize| {
        Some(u64::from(u16::from_le_bytes([
            *gate.get(at)?,
            *gate.get(at + 1)?,
        ])))
    };
    Some(word(0)? | word(6)? << 16 | word(8)? << 32 | word(10)? << 48)
}

/// `name` or `name+0x10` as an address.
pub(super) fn address(symbols: &Symbols, text: &str) -> Result<u64> {
    let (name, offset) = text.split_once('+').unwrap_or((text, "0x0"));
    let Some(at) = symbols.address(name) else {
        bail!(
            "{text:?} is neither an address (gva:0x…, gpa:0x…, hva:0x…, hpa:0x…) nor one of the {} \
             symbols of the guest's kernel",
            symbols.len()
        );
    };
    let offset = parse_hex(offset).with_context(|| format!("{text:?}: {offset:?} is no offset"))?;
    Ok(at.wrapping_add(offset))
}
