//! Builds the command, the preload library and the selftests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::workspace;

/// The `fourfold` binary, built for release with its preload library beside it.
pub(crate) fn fourfold() -> Result<PathBuf> {
    let args = ["build", "--release", "-p", "fourfold", "-p", "preload"];
    run(Command::new(env!("CARGO")).args(args))?;
    Ok(workspace::target_directory()?.join("release/fourfold"))
}

/// The folder of the built selftests (`tools/testing/selftests/kvm`).
pub(crate) fn selftests(source: &Path) -> Result<PathBuf> {
    let tree = if source.is_dir() {
        source.to_owned()
    } else {
        unpack(source)?
    };
    let folder = tree.join("tools/testing/selftests/kvm");
    let stamp = folder.join(".built");
    if !stamp.exists() {
        println!("building the selftests in {}", folder.display());
        let jobs = format!("-j{}", std::thread::available_parallelism()?);
        run(Command::new("make")
            .args(["-s", "-C"])
            .arg(&tree)
            .args([&jobs, "headers"]))?;
        run(Command::new("make")
            .args(["-s", "-C"])
            .arg(&folder)
            .arg(&jobs))?;
        std::fs::write(&stamp, "")?;
    }
    Ok(folder)
}

fn unpack(archive: &Path) -> Result<PathBuf> {
    if !archive.exists() {
        bail!(
            "no kernel source at {}: apt-get install linux-source-6.12 rsync flex bison, or --source",
            archive.display()
        );
    }
    let tree = workspace::target_directory()?.join("selftests");
    let stamp = tree.join(".unpacked");
    if !stamp.exists() {
        println!("unpacking {}", archive.display());
        std::fs::create_dir_all(&tree)?;
        run(Command::new("tar")
            .args(["--strip-components=1", "-C"])
            .arg(&tree)
            .arg("-xf")
            .arg(archive))?;
        std::fs::write(&stamp, "")?;
    }
    Ok(tree)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("can't start {}", command.get_program().display()))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
