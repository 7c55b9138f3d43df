//! What the accelerator keeps between the guest's tables and the host's.

use std::sync::Arc;

use addr::{Gpa, Gva};
use mmu::{Mmu, PagingPath, Regime};

use crate::chain::{SecondLevel, TableEntry};
use crate::decode::words;

/// The accelerator's tables.
#[derive(Clone)]
pub enum Tables<'a> {
    /// Those of our MMU.
    Ours(&'a Arc<Mmu>),
    /// They can't be seen; why not.
    Hidden(String),
}

/// The entries on the way to a page.
pub(crate) fn second_level(
    tables: &Tables<'_>,
    regime: &Regime,
    gva: Option<Gva>,
    gpa: Gpa,
) -> SecondLevel {
    let mmu = match tables {
        Tables::Ours(mmu) => mmu,
        Tables::Hidden(why) => return SecondLevel::Hidden { why: why.clone() },
    };
    match (mmu.path(), gva) {
        (PagingPath::Nested, _) => SecondLevel::Nested {
            entries: nested(mmu, gpa),
        },
        (PagingPath::Shadow, Some(gva)) => SecondLevel::Shadow {
            entries: shadow(mmu, regime, gva),
        },
        (PagingPath::Shadow, None) => SecondLevel::Hidden {
            why: "shadow tables are found by guest virtual addresses; ask for one".to_owned(),
        },
        (PagingPath::Direct, _) => SecondLevel::Direct,
    }
}

fn nested(mmu: &Mmu, gpa: Gpa) -> Vec<TableEntry> {
    let entries = mmu.second_level(0, gpa).into_iter();
    entries
        .map(|entry| TableEntry {
            level: entry.level,
            value: entry.raw,
            hva: entry.hva,
            flags: match (entry.raw, entry.hva, entry.writable) {
                (0, ..) => Vec::new(),
                (_, None, _) => words(["P", "table"].into_iter()),
                (_, Some(_), true) => words(["P", "W"].into_iter()),
                (_, Some(_), false) => words(["P"].into_iter()),
            },
        })
        .collect()
}

fn shadow(mmu: &Mmu, regime: &Regime, gva: Gva) -> Vec<TableEntry> {
    let entries = mmu.shadow_path(0, regime, gva).into_iter();
    entries
        .map(|entry| TableEntry {
            level: entry.level,
            value: entry.raw,
            hva: entry.hva,
            flags: words(entry.flags.into_iter()),
        })
        .collect()
}
