//! `fourfold map`: all of a guest's physical memory.

use std::{fs, mem::MaybeUninit, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result};
use clap::Args;
use control::MapQuery;
use explain::map::{MemoryMap, html, svg};

use super::{Which, machine, print_json, say};
use crate::ending::Ending;

/// Options of `map`.
#[derive(Debug, Args)]
pub(crate) struct MapOptions {
    #[command(flatten)]
    which: Which,
    /// Draw it again every so many seconds, until Ctrl-C or the machine's end
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<u64>,
    /// Columns of the picture [default: the terminal's, or 80]
    #[arg(long, value_name = "N")]
    width: Option<usize>,
    /// Write a picture that stands by itself to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write a page with the picture to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Print the map as JSON: the API's `MemoryMap`
    #[arg(long)]
    json: bool,
}

/// Asks and shows.
pub(crate) fn run(options: &MapOptions) -> Result<Ending> {
    let client = machine(&options.which.name()?)?;
    let map: MemoryMap = client.get("/map", &MapQuery::default())?;
    let pictures = [(&options.svg, svg as fn(&_) -> _), (&options.html, html)];
    for (path, draw) in pictures {
        if let Some(path) = path {
            fs::write(path, draw(&map)).with_context(|| format!("writing {}", path.display()))?;
            eprintln!("fourfold: wrote {}", path.display());
        }
    }
    if options.json {
        print_json(&map)?;
    } else if options.svg.is_none() && options.html.is_none() {
        show(options, &map)?;
    }
    let Some(seconds) = options.watch else {
        return Ok(Ending::Done);
    };
    loop {
        thread::sleep(Duration::from_secs(seconds.max(1)));
        // A machine that has ended ends the watching.
        let Ok(map) = client.get::<MemoryMap>("/map", &MapQuery::default()) else {
            return Ok(Ending::Done);
        };
        if options.json {
            print_json(&map)?;
        } else {
            say("\x1b[H\x1b[2J")?;
            show(options, &map)?;
        }
    }
}

fn show(options: &MapOptions, map: &MemoryMap) -> Result<()> {
    say(&map.to_text(options.width.unwrap_or_else(columns)))
}

/// Columns of the terminal.
#[expect(unsafe_code, reason = "asking a terminal for its size is an ioctl")]
fn columns() -> usize {
    const DEFAULT: usize = 80;
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ fills a winsize in where it gives 0, and zeroes are one.
    let size = unsafe {
        if libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr()) != 0 {
            return DEFAULT;
        }
        size.assume_init()
    };
    match size.ws_col {
        0 => DEFAULT,
        columns => columns.into(),
    }
}
