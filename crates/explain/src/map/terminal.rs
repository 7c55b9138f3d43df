//! The map as a table and a picture for a terminal of any width.

use std::fmt::Write;

use super::{MemoryMap, RegionMap, Tally};
use crate::text::size;

/// The narrowest terminal for which the picture is made; a narrower one wraps it.
const LEAST: usize = 60;

impl MemoryMap {
    /// Table and picture, at most `width` columns wide.
    pub fn to_text(&self, width: usize) -> String {
        let width = width.max(LEAST);
        let mut text = String::new();
        let paging = self.paging.as_deref().unwrap_or("kvm");
        let _ = writeln!(text, "{}: guest physical memory, {paging}", self.name);
        if let (Some([small, medium, large]), Some(tables)) = (self.pages, self.table_bytes) {
            let _ = writeln!(
                text,
                "tables map {small} pages of 4 KiB, {medium} of 2 MiB, {large} of 1 GiB, in {} KiB",
                tables >> 10
            );
        }
        text.push('\n');
        self.table(&mut text, width);
        for region in self.regions.iter().filter(|r| !r.cells.is_empty()) {
            picture(&mut text, region, width);
        }
        if self.regions.iter().any(|r| !r.cells.is_empty()) {
            text.push_str(LEGEND);
        }
        for why in &self.unknown {
            let _ = writeln!(text, "not seen: {why}");
        }
        text
    }

    fn table(&self, text: &mut String, width: usize) {
        let name = self.regions.iter().map(|r| r.name.len()).max().unwrap_or(0);
        let name = name.clamp(6, width.saturating_sub(54));
        let _ = writeln!(
            text,
            "{:name$}  {:>12}  {:>9}  {:>9}  {:>8}  {:>8}",
            "region", "gpa", "size", "mapped", "resident", "huge"
        );
        for region in &self.regions {
            let _ = write!(
                text,
                "{:name$.name$}  {:>12}  {:>9}",
                region.name,
                format!("{:#x}", region.gpa),
                size(region.bytes)
            );
            if region.cells.is_empty() {
                let _ = writeln!(text, "  {}", region.kind);
                continue;
            }
            let t = &region.total;
            let _ = writeln!(
                text,
                "  {:>8}%  {:>7}%  {:>7}%{}",
                percent(t.mapped(), region.bytes),
                percent(t.resident, region.bytes),
                percent(t.huge, region.bytes),
                remarks(t)
            );
        }
    }
}

const LEGEND: &str = "
second level  1 = 1 GiB  2 = 2 MiB  4 = 4 KiB pages  . = not mapped
host          H = huge   # = all    + = some resident  s = swapped  . = nothing
";

fn remarks(tally: &Tally) -> String {
    let mut text = String::new();
    if tally.swapped > 0 {
        let _ = write!(text, ", {} swapped", size(tally.swapped));
    }
    if tally.shared > 0 {
        let _ = write!(text, ", {} shared", size(tally.shared));
    }
    text
}

fn percent(part: u64, whole: u64) -> u64 {
    (part * 100).div_ceil(whole.max(1)).min(100)
}

/// Lines of cells: for each, what the second level has, and below it what the host has.
fn picture(text: &mut String, region: &RegionMap, width: usize) {
    const MARGIN: usize = 16;
    /// Lines of a large region at most.
    const LINES: usize = 8;
    let columns = (width - MARGIN).min(128) / 8 * 8;
    let cells = merge(&region.cells, columns * LINES);
    let cell = region.bytes.div_ceil(cells.len().max(1) as u64);
    let _ = writeln!(
        text,
        "\n{}, one character for {}",
        region.name,
        size(cell.next_multiple_of(4096))
    );
    for (line, part) in cells.chunks(columns).enumerate() {
        let gpa = region.gpa.raw() + (line * columns) as u64 * cell;
        let second: String = part.iter().map(second_level).collect();
        let host: String = part.iter().map(|t| host(t, cell)).collect();
        let _ = writeln!(text, "{gpa:>#14x}  {second}");
        let _ = writeln!(text, "{:>14}  {host}", "host");
    }
}

/// At most `most` cells, each of several.
pub(super) fn merge(cells: &[Tally], most: usize) -> Vec<Tally> {
    let each = cells.len().div_ceil(most.max(1)).max(1);
    let parts = cells.chunks(each);
    parts
        .map(|part| {
            let mut sum = Tally::default();
            for cell in part {
                sum.add(cell);
            }
            sum
        })
        .collect()
}

fn second_level(tally: &Tally) -> char {
    let most = tally.mapped_4k.max(tally.mapped_2m).max(tally.mapped_1g);
    match most {
        0 => '.',
        _ if most == tally.mapped_1g => '1',
        _ if most == tally.mapped_2m => '2',
        _ => '4',
    }
}

fn host(tally: &Tally, cell: u64) -> char {
    match tally.resident {
        0 if tally.swapped > 0 => 's',
        0 => '.',
        _ if tally.huge * 2 > tally.resident => 'H',
        resident if resident >= cell => '#',
        _ => '+',
    }
}
