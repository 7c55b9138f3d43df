//! Builds the command, the preload library and the selftests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::list::{CORE, Set};
use crate::workspace;

/// The `fourfold` binary, built for release with its preload library beside it.
pub(crate) fn fourfold() -> Result<PathBuf> {
    let args = ["build", "--release", "-p", "fourfold", "-p", "preload"];
    run(Command::new(env!("CARGO")).args(args))?;
    Ok(workspace::target_directory()?.join("release/fourfold"))
}

/// Where Debian's package linux-source-6.12 puts the kernel's source.
pub(crate) const SOURCE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// The parts of the source that the selftests need.
const PARTS: &[&str] = &[
    "*/Makefile",
    "*/Kbuild*",
    "*/scripts/*",
    "*/tools/*",
    "*/include/*",
    "*/arch/x86/*",
    "*/usr/*",
];

/// The folder of the built selftests (`tools/testing/selftests/kvm`).
pub(crate) fn selftests(source: &Path, set: Set) -> Result<PathBuf> {
    let tree = if source.is_dir() {
        source.to_owned()
    } else {
        unpack(source)?
    };
    let folder = tree.join("tools/testing/selftests/kvm");
    let all = folder.join(".built");
    let stamp = match set {
        Set::All => all.clone(),
        Set::Core => folder.join(".built-core"),
    };
    if !stamp.exists() && !all.exists() {
        make(&tree, &folder, set)?;
        std::fs::write(&stamp, "")?;
    }
    Ok(folder)
}

fn make(tree: &Path, folder: &Path, set: Set) -> Result<()> {
    println!("building the selftests in {}", folder.display());
    let jobs = format!("-j{}", std::thread::available_parallelism()?);
    let in_folder = |folder: &Path| {
        let mut command = Command::new("make");
        command.args(["-s", "-C"]).arg(folder).arg(&jobs);
        command
    };
    run(in_folder(tree).arg("headers"))?;
    let mut tests = in_folder(&folder.canonicalize()?);
    if set == Set::Core {
        let folder = folder.canonicalize()?;
        tests.args(CORE.iter().map(|test| folder.join(test)));
    }
    run(&mut tests)
}

fn unpack(archive: &Path) -> Result<PathBuf> {
    if !archive.exists() {
        bail!(
            "no kernel source at {}: apt-get install linux-source-6.12 make gcc rsync, or --source",
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
            .arg(archive)
            .arg("--wildcards")
            .args(PARTS))?;
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
