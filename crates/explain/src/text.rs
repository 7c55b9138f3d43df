//! A chain as a person reads it.

use std::fmt;

use crate::chain::{Chain, GuestSide, SecondLevelSide, SlotSide};
use crate::host::HostSide;

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "gva  {:#x}   {}, {}", self.gva, self.access, self.mode)?;
        for entry in &self.entries {
            writeln!(
                f,
                "  {:<5} [{:>3}] at gpa {:#x} = {:#018x}  {}",
                entry.name,
                entry.index,
                entry.gpa,
                entry.value,
                entry.flags.join(" ")
            )?;
        }
        writeln!(f, "{}", self.guest)?;
        if self.gpa().is_some() {
            match &self.slot {
                Some(slot) => writeln!(f, "{slot}")?,
                None => writeln!(f, "  in no memslot: an access is MMIO, and the monitor's")?,
            }
        }
        if let Some(entries) = &self.second_level {
            write_second_level(f, entries)?;
        }
        self.host.iter().try_for_each(|host| writeln!(f, "{host}"))
    }
}

impl fmt::Display for GuestSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page {
                gpa,
                page_bytes,
                rights,
                global,
            } => {
                write!(
                    f,
                    "gpa  {gpa:#x}   page of {} KiB, {}",
                    page_bytes >> 10,
                    rights.join(" ")
                )?;
                if *global {
                    write!(f, ", global")
                } else {
                    Ok(())
                }
            }
            Self::PageFault {
                error_code,
                reasons,
            } => write!(
                f,
                "  leads nowhere: #PF with error code {error_code:#x} ({})",
                reasons.join(", ")
            ),
            Self::HostFault { hva } => {
                write!(
                    f,
                    "  a guest table has no memory of the host behind it, at hva {hva:#x}"
                )
            }
        }
    }
}

impl fmt::Display for SlotSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "  slot {}: gpa {:#x} + {} MiB -> hva {:#x}{}{}; offset {:#x}",
            self.slot,
            self.gpa,
            self.bytes >> 20,
            self.hva,
            if self.writable { "" } else { ", read-only" },
            if self.logs_dirty { ", logs writes" } else { "" },
            self.offset
        )
    }
}

fn write_second_level(f: &mut fmt::Formatter<'_>, entries: &[SecondLevelSide]) -> fmt::Result {
    for entry in entries {
        write!(f, "  second level, level {}: ", entry.level)?;
        match entry.hva {
            _ if entry.value == 0 => writeln!(f, "empty")?,
            Some(hva) => writeln!(
                f,
                "{:#018x} -> hva {hva:#x}{}",
                entry.value,
                if entry.writable {
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

impl fmt::Display for HostSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
