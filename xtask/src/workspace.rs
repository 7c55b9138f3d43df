//! Where things are.

use std::path::PathBuf;

use anyhow::Result;
use cargo_metadata::MetadataCommand;

/// The folder that cargo builds into.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let metadata = MetadataCommand::new().no_deps().exec()?;
    Ok(metadata.target_directory.into_std_path_buf())
}
