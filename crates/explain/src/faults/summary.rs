//! Faults summed up: by cause, by region, by instruction, by function.

use std::collections::HashMap;
use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::record::{FaultRecord, Line};
use crate::symbols::Symbols;

/// A number of faults and what they cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Totals {
    /// What they have in common.
    pub name: String,
    /// How many.
    pub count: u64,
    /// Nanoseconds that they took together.
    pub cost_ns: u64,
}

/// Faults summed up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Summary {
    /// All.
    pub faults: u64,
    /// Faults that were lost: they are in no sum.
    pub dropped: u64,
    /// By cause and access.
    pub causes: Vec<Totals>,
    /// By region of guest physical memory.
    pub regions: Vec<Totals>,
    /// By instruction.
    pub instructions: Vec<Totals>,
    /// By function of the guest, where symbols were given.
    pub functions: Vec<Totals>,
}

/// Lines of each table of the text.
const TOP: usize = 10;

impl Summary {
    /// Sums up `lines`.
    pub fn of<'a>(lines: impl Iterator<Item = &'a Line>, symbols: Option<&Symbols>) -> Self {
        let mut counting = Counting::default();
        for line in lines {
            counting.add(line, symbols);
        }
        counting.finish()
    }
}

/// A summary that grows.
#[derive(Default)]
pub struct Counting {
    faults: u64,
    dropped: u64,
    tables: [HashMap<String, (u64, u64)>; 4],
}

impl Counting {
    /// One line more.
    pub fn add(&mut self, line: &Line, symbols: Option<&Symbols>) {
        match line {
            Line::Fault(record) => self.fault(record, symbols),
            Line::Dropped { count, .. } => self.dropped += count,
            Line::Idle { .. } => {}
        }
    }

    fn fault(&mut self, record: &FaultRecord, symbols: Option<&Symbols>) {
        self.faults += 1;
        let keys = [
            Some(format!("{}, {}", record.cause, record.access)),
            record.region.clone(),
            Some(format!("{:#x}", record.rip)),
            symbols.map(|symbols| {
                let function = symbols.find(record.rip);
                function.map_or("(no symbol)", |(name, _)| name).to_owned()
            }),
        ];
        for (table, key) in self.tables.iter_mut().zip(keys) {
            if let Some(key) = key {
                let totals = table.entry(key).or_default();
                totals.0 += 1;
                totals.1 += record.cost_ns;
            }
        }
    }

    /// The sums, the largest first.
    pub fn finish(self) -> Summary {
        let [causes, regions, instructions, functions] = self.tables.map(sorted);
        Summary {
            faults: self.faults,
            dropped: self.dropped,
            causes,
            regions,
            instructions,
            functions,
        }
    }
}

fn sorted(table: HashMap<String, (u64, u64)>) -> Vec<Totals> {
    let mut totals: Vec<_> = table
        .into_iter()
        .map(|(name, (count, cost_ns))| Totals {
            name,
            count,
            cost_ns,
        })
        .collect();
    totals.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.name.cmp(&b.name)));
    totals
}

impl Display for Summary {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} faults, {} lost", self.faults, self.dropped)?;
        let tables = [
            ("by cause", &self.causes),
            ("by region", &self.regions),
            ("by guest instruction", &self.instructions),
            ("by guest function", &self.functions),
        ];
        for (name, table) in tables {
            if table.is_empty() {
                continue;
            }
            writeln!(
                f,
                "\n{name:<44} {:>10} {:>12} {:>10}",
                "faults", "total", "each"
            )?;
            for totals in table.iter().take(TOP) {
                writeln!(
                    f,
                    "  {:<42} {:>10} {:>9} us {:>7} ns",
                    totals.name,
                    totals.count,
                    totals.cost_ns / 1000,
                    totals.cost_ns / totals.count.max(1)
                )?;
            }
            if table.len() > TOP {
                writeln!(f, "  and {} more", table.len() - TOP)?;
            }
        }
        Ok(())
    }
}
