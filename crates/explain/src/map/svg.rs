//! The map as a picture that stands by itself: one SVG, or an HTML page around it.

use std::fmt::Write;

use super::terminal::merge;
use super::{MemoryMap, RegionMap, Tally};
use crate::text::size;

const CELL: usize = 9;
const COLUMNS: usize = 96;
const LEFT: usize = 130;
const WIDTH: usize = LEFT + COLUMNS * CELL + 20;
const MOST_CELLS: usize = COLUMNS * 12;

/// Colours of the two halves of a cell, and what they say.
const COLOURS: [(&str, &str); 8] = [
    ("#2b6cb0", "second level: 1 GiB pages"),
    ("#4299e1", "second level: 2 MiB pages"),
    ("#90cdf4", "second level: 4 KiB pages"),
    ("#e2e8f0", "nothing"),
    ("#276749", "host: huge pages"),
    ("#68d391", "host: resident"),
    ("#c6f6d5", "host: partly resident"),
    ("#ed8936", "host: swapped"),
];

/// The picture.
pub fn svg(map: &MemoryMap) -> String {
    let mut body = String::new();
    let mut y = 60;
    for region in &map.regions {
        y = draw(&mut body, region, y);
    }
    y = legend(&mut body, y + 10);
    let title = escape(&map.name);
    let paging = escape(map.paging.as_deref().unwrap_or("kvm"));
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>Guest physical memory of {title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"20\" y=\"30\" font-size=\"18\">Guest physical memory of {title} ({paging})</text>\n\
         <text x=\"20\" y=\"48\" fill=\"#4a5568\">upper half of a cell: what the second level maps; \
         lower half: what the host holds</text>\n{body}</svg>\n",
        height = y + 10
    )
}

/// A page with the picture in it.
pub fn html(map: &MemoryMap) -> String {
    let title = escape(&map.name);
    let mut notes = String::new();
    for why in &map.unknown {
        let _ = writeln!(notes, "<p>Not seen: {}</p>", escape(why));
    }
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <title>Memory of {title}</title>\n<style>body {{ margin: 1em; font-family: sans-serif }} \
         svg {{ max-width: 100%; height: auto }}</style></head>\n<body>\n{}{notes}</body>\n</html>\n",
        svg(map)
    )
}

/// Draws one region from `y` on; gives where the next begins.
fn draw(out: &mut String, region: &RegionMap, y: usize) -> usize {
    let name = escape(&region.name);
    let about = if region.cells.is_empty() {
        format!("{}, {}", size(region.bytes), escape(&region.kind))
    } else {
        format!(
            "{}, slot {}, {} mapped, {} resident",
            size(region.bytes),
            region
                .slot
                .map_or_else(|| "-".to_owned(), |slot| slot.to_string()),
            rounded(region.total.mapped()),
            rounded(region.total.resident)
        )
    };
    let _ = writeln!(
        out,
        "<text x=\"20\" y=\"{}\" font-weight=\"bold\">{name}</text>\
         <text x=\"{LEFT}\" y=\"{}\" fill=\"#4a5568\">gpa {:#x}: {about}</text>",
        y + 12,
        y + 12,
        region.gpa
    );
    let cells = merge(&region.cells, MOST_CELLS);
    let bytes = region.bytes.div_ceil(cells.len().max(1) as u64);
    let top = y + 20;
    for (line, part) in cells.chunks(COLUMNS).enumerate() {
        let row = top + line * (2 * CELL + 3);
        let start = region.gpa.raw() + (line * COLUMNS) as u64 * bytes;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" font-size=\"10\">{start:#x}</text>",
            LEFT - 6,
            row + CELL + 4
        );
        runs(out, part, row, second_level);
        runs(out, part, row + CELL, |t| host(t, bytes));
    }
    top + cells.len().div_ceil(COLUMNS) * (2 * CELL + 3) + 10
}

/// One rectangle for each run of equal cells.
fn runs(out: &mut String, cells: &[Tally], y: usize, colour: impl Fn(&Tally) -> usize) {
    let mut from = 0;
    while from < cells.len() {
        let what = colour(&cells[from]);
        let run = cells[from..]
            .iter()
            .take_while(|t| colour(t) == what)
            .count();
        let (fill, says) = COLOURS[what];
        let _ = writeln!(
            out,
            "<rect x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{fill}\">\
             <title>{says}</title></rect>",
            LEFT + from * CELL,
            run * CELL,
            CELL - 1
        );
        from += run;
    }
}

fn second_level(tally: &Tally) -> usize {
    let most = tally.mapped_4k.max(tally.mapped_2m).max(tally.mapped_1g);
    match most {
        0 => 3,
        _ if most == tally.mapped_1g => 0,
        _ if most == tally.mapped_2m => 1,
        _ => 2,
    }
}

fn host(tally: &Tally, cell: u64) -> usize {
    match tally.resident {
        0 if tally.swapped > 0 => 7,
        0 => 3,
        _ if tally.huge * 2 > tally.resident => 4,
        resident if resident >= cell => 5,
        _ => 6,
    }
}

fn legend(out: &mut String, y: usize) -> usize {
    for (index, (fill, says)) in COLOURS.iter().enumerate() {
        let (x, y) = (20 + index % 4 * 235, y + index / 4 * 20);
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"14\" height=\"12\" fill=\"{fill}\" \
             stroke=\"#a0aec0\"/><text x=\"{}\" y=\"{}\">{says}</text>",
            x + 20,
            y + 11
        );
    }
    y + 40
}

fn rounded(bytes: u64) -> String {
    if bytes >= 10 << 20 {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{} KiB", bytes >> 10)
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
