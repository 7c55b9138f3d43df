//! Where the preload library is.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

const NAME: &str = "libfourfold_preload.so";

/// The library: beside the command (where cargo builds both), or in the `lib/fourfold` folder next
/// to the command's `bin` (where it is installed).
pub(crate) fn find() -> Result<PathBuf> {
    let command = env::current_exe().context("looking for the preload library")?;
    let folder = command.parent().context("the command lies in no folder")?;
    let places = [folder.join(NAME), folder.join("../lib/fourfold").join(NAME)];
    match places.iter().find(|p| p.exists()) {
        Some(place) => Ok(place.canonicalize()?),
        None => bail!(
            "no {NAME} beside {}: build it with `cargo build --release -p preload`",
            command.display()
        ),
    }
}

/// `LD_PRELOAD` with our library first, then what was there.
pub(crate) fn preload_list(library: &std::path::Path) -> OsString {
    let mut list = library.as_os_str().to_owned();
    if let Some(before) = env::var_os("LD_PRELOAD").filter(|b| !b.is_empty()) {
        list.push(":");
        list.push(before);
    }
    list
}
