//! What both sides boot.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, ensure};

use super::{Options, Part};
use crate::workspace;

/// Kernel, initial RAM disk and command line.
pub(super) struct Guest {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) command_line: String,
}

impl Guest {
    pub(super) fn prepare(options: &Options) -> Result<Self> {
        let kernel = match &options.kernel {
            Some(kernel) => kernel.clone(),
            None => default_kernel()?,
        };
        let initrd = match &options.initrd {
            Some(initrd) => initrd.clone(),
            None => workloads()?,
        };
        Ok(Self {
            kernel,
            initrd,
            command_line: format!("console=ttyS0 panic=-1 {}{}", options.append, Part::PLACE),
        })
    }
}

/// The kernel that `fourfold run` keeps.
fn default_kernel() -> Result<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set")?;
    let kernel = cache.join("fourfold/debian-cloud/vmlinuz");
    ensure!(
        kernel.is_file(),
        "no {}: run `fourfold run --exec true` once, or give --kernel",
        kernel.display()
    );
    Ok(kernel)
}

/// An initial RAM disk with nothing but the workloads.
fn workloads() -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/workloads.c");
    let directory = workspace::target_directory()?.join("compare-tcg");
    let tree = directory.join("tree");
    fs::create_dir_all(&tree)?;
    let archive = directory.join("initramfs.cpio");
    compile(&source, &tree.join("init"))?;
    let packed = Command::new("sh")
        .args(["-c", "find . | cpio --quiet --create --format=newc"])
        .current_dir(&tree)
        .stdout(fs::File::create(&archive)?)
        .status()
        .context("can't start sh")?;
    ensure!(packed.success(), "cpio (is it installed?) failed: {packed}");
    Ok(archive)
}

fn compile(source: &Path, program: &Path) -> Result<()> {
    let status = Command::new("cc")
        .args(["-O2", "-static", "-Wall", "-o"])
        .arg(program)
        .arg(source)
        .status()
        .context("can't start cc")?;
    ensure!(status.success(), "cc failed: {status}");
    Ok(())
}
