//! Arrows go down only: a crate may depend on crates that stand below it in [`LAYERS`].

use anyhow::{Result, bail, ensure};
use cargo_metadata::{MetadataCommand, Package};

/// The crates from top to bottom. A crate may use (also in its tests and its build script) any
/// crate further down, and none further up.
const LAYERS: &[&str] = &[
    "xtask",
    "fourfold",
    "preload",
    "control",
    "explain",
    "vmm",
    "devices",
    "accel",
    "kvm",
    "differential",
    "cpu",
    "mmu",
    "memory",
    "x86",
    "addr",
    "guest",
];

/// Checks every dependency edge between workspace members, dev- and build-dependencies included.
pub(crate) fn check() -> Result<()> {
    let metadata = MetadataCommand::new().no_deps().exec()?;
    let members = metadata.workspace_packages();
    let mut upward = Vec::new();
    for package in &members {
        let above = height(&package.name)?;
        for dependency in &package.dependencies {
            if !members.iter().any(|m| *m.name == dependency.name) {
                continue;
            }
            if height(&dependency.name)? <= above {
                upward.push(format!("{} -> {}", package.name, dependency.name));
            }
        }
    }
    ensure!(
        upward.is_empty(),
        "dependencies that point up:\n  {}",
        upward.join("\n  ")
    );
    for package in &members {
        described(package)?;
    }
    println!("layers: {} crates, every arrow points down", members.len());
    Ok(())
}

/// Every room has a few words at its door.
fn described(package: &Package) -> Result<()> {
    let readme = package.manifest_path.with_file_name("README.md");
    ensure!(readme.exists(), "crate {} has no {readme}", package.name);
    Ok(())
}

fn height(name: &str) -> Result<usize> {
    match LAYERS.iter().position(|l| *l == name) {
        Some(index) => Ok(index),
        None => bail!("crate {name} has no place in xtask/src/layers.rs"),
    }
}
