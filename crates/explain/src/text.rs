//! A chain as a person reads it.

use std::fmt::{self, Display, Formatter};

use crate::backwards::Backwards;
use crate::chain::{
    Chain, GuestEntry, GuestSide, PagingSide, SecondLevel, SlotSide, TableEntry, TlbSide,
};
use crate::host::HostSide;

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(gva) = self.gva {
            write!(f, "gva  {gva:#x}   ")?;
            if let Some(symbol) = &self.symbol {
                write!(f, "{symbol}, ")?;
            }
            let mode = self.paging.as_ref().map_or("", |paging| &paging.mode);
            writeln!(f, "{}, {mode}", self.access)?;
        } else if self.gpa.is_none() {
            writeln!(f, "{}   {}", self.asked, self.access)?;
        }
        self.write_registers(f)?;
        self.entries
            .iter()
            .try_for_each(|entry| writeln!(f, "{entry}"))?;
        match (&self.guest, self.gpa) {
            (Some(side), _) => writeln!(f, "{side}")?,
            (None, Some(gpa)) => writeln!(f, "gpa  {gpa:#x}   {}", self.access)?,
            (None, None) => {}
        }
        self.write_physical(f)?;
        if let Some(tlb) = &self.tlb {
            writeln!(f, "{tlb}")?;
        }
        self.host
            .iter()
            .try_for_each(|host| writeln!(f, "{host}"))?;
        self.backwards
            .iter()
            .try_for_each(|back| write!(f, "{back}"))?;
        writeln!(f, "so   {}", self.verdict)?;
        self.checks
            .iter()
            .try_for_each(|check| writeln!(f, "check: {check}"))?;
        self.unknown
            .iter()
            .try_for_each(|why| writeln!(f, "not seen: {why}"))
    }
}

impl Chain {
    fn write_registers(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let (Some(vcpu), Some(_)) = (&self.vcpu, &self.paging) {
            writeln!(
                f,
                "  vCPU {} at rip {:#x}, CPL {}",
                vcpu.vcpu, vcpu.rip, vcpu.cpl
            )?;
        }
        self.paging
            .iter()
            .try_for_each(|paging| write!(f, "{paging}"))
    }

    fn write_physical(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.gpa.is_none() {
            return Ok(());
        }
        match (&self.slot, &self.region) {
            (Some(slot), _) => writeln!(f, "{slot}")?,
            (None, Some(region)) => {
                writeln!(f, "  in no memslot; the monitor has `{region}` there")?;
            }
            (None, None) => writeln!(f, "  in no memslot: an access is MMIO, and the monitor's")?,
        }
        match &self.second_level {
            Some(second) if self.slot.is_some() => write!(f, "{second}"),
            _ => Ok(()),
        }
    }
}

impl Display for PagingSide {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.mode == "no paging" {
            return Ok(());
        }
        write!(f, "  cr3 {:#x}", self.cr3)?;
        if !self.in_force.is_empty() {
            write!(f, "; in force: {}", self.in_force.join(" "))?;
        }
        writeln!(f)
    }
}

impl Display for GuestEntry {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "  {:<5} [{:>3}] at gpa {:#x} = {:#018x}  {}",
            self.name,
            self.index,
            self.gpa,
            self.value,
            self.flags.join(" ")
        )?;
        match self.page_bytes {
            Some(bytes) => write!(f, "  -> page of {}", size(bytes)),
            None => Ok(()),
        }
    }
}

impl Display for GuestSide {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page {
                gpa,
                page_bytes,
                rights,
                global,
                key,
            } => {
                let rights = rights.join(" ");
                write!(f, "gpa  {gpa:#x}   page of {}, {rights}", size(*page_bytes))?;
                if *global {
                    write!(f, ", global")?;
                }
                if *key != 0 {
                    write!(f, ", protection key {key}")?;
                }
                Ok(())
            }
            Self::PageFault {
                error_code,
                reasons,
                rule,
            } => write!(
                f,
                "  leads nowhere: #PF with error code {error_code:#x} ({})\n  because {rule}",
                reasons.join(", ")
            ),
            Self::NotCanonical { linear_bits } => write!(
                f,
                "  leads nowhere: #GP(0), bits 63 to {} are not all equal",
                linear_bits - 1
            ),
            Self::HostFault { hva } => write!(
                f,
                "  a guest table has no memory of the host behind it, at hva {hva:#x}"
            ),
        }
    }
}

impl Display for SlotSide {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let slot = &self.range;
        write!(f, "  slot {}: ", slot.slot)?;
        if let Some(name) = &slot.name {
            write!(f, "`{name}`, ")?;
        }
        write!(
            f,
            "gpa {:#x} + {} -> hva {:#x}{}{}; offset {:#x}",
            slot.gpa,
            size(slot.bytes),
            slot.hva,
            if slot.writable { "" } else { ", read-only" },
            if slot.logs_dirty { ", logs writes" } else { "" },
            self.offset
        )
    }
}

impl Display for SecondLevel {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nested { entries } => write_entries(f, "second level", entries),
            Self::Shadow { entries } if entries.is_empty() => {
                writeln!(f, "  shadow tables: none for this root yet")
            }
            Self::Shadow { entries } => write_entries(f, "shadow", entries),
            Self::Direct => writeln!(f, "  no second level: the TLB is filled from slots"),
            Self::Hidden { .. } => Ok(()),
        }
    }
}

fn write_entries(f: &mut Formatter<'_>, what: &str, entries: &[TableEntry]) -> fmt::Result {
    for entry in entries {
        write!(f, "  {what}, level {}: ", entry.level)?;
        match entry.hva {
            _ if entry.value == 0 => writeln!(f, "empty")?,
            Some(hva) => writeln!(
                f,
                "{:#018x} -> hva {hva:#x}{}",
                entry.value,
                if entry.flags.iter().any(|flag| flag == "W") {
                    ", writable"
                } else {
                    ", write-protected"
                }
            )?,
            None => writeln!(f, "{:#018x} -> table", entry.value)?,
        }
    }
    Ok(())
}

impl Display for TlbSide {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hit { hva, allows } => {
                write!(f, "  TLB: hit -> hva {hva:#x}, {}", allows.join(" "))
            }
            Self::Miss => write!(f, "  TLB: miss"),
            Self::Hidden { .. } => write!(f, "  TLB: can't be seen"),
        }
    }
}

impl Display for HostSide {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "hva  {:#x}   ", self.hva)?;
        match (&self.file, self.file_offset) {
            (Some(file), Some(offset)) => write!(f, "{} + {offset:#x}", file.display())?,
            (Some(name), None) => write!(f, "{}", name.display())?,
            (None, _) => write!(f, "anonymous memory")?,
        }
        write!(f, "\nhpa  ")?;
        match self.hpa {
            Some(hpa) => write!(f, "{hpa:#x}   {}", self.state)?,
            None => write!(f, "-   {}", self.state)?,
        }
        if self.huge == Some(true) {
            write!(f, ", in a huge page")?;
        }
        match &self.flags {
            Some(flags) if !flags.is_empty() => write!(f, ", {flags}"),
            _ => Ok(()),
        }
    }
}

impl Display for Backwards {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "back")?;
        if self.slots.len() > 1 {
            for slot in &self.slots {
                writeln!(f, "{slot}")?;
            }
        }
        for mapping in &self.mappings {
            writeln!(
                f,
                "  gva {:#x}   page of {}, {}",
                mapping.gva,
                size(mapping.page_bytes),
                mapping.rights.join(" ")
            )?;
        }
        let end = match (self.mappings.is_empty(), self.complete) {
            (true, true) => "no mapping below this CR3 leads here",
            (false, true) => "these are all below this CR3",
            (_, false) => "the search stopped at its limit: there may be more",
        };
        writeln!(f, "  {end} ({} tables read)", self.tables)
    }
}

/// Bytes in the largest unit that divides them.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units
        .iter()
        .find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    match unit {
        Some((shift, name)) => format!("{} {name}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}
