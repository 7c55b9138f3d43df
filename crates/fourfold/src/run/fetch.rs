//! The default guest: Debian's cloud kernel and busybox, fetched once into the cache directory.
//!
//! `apt-get download` needs no root, checks signatures as the host's own updates do, and knows the
//! host's mirrors; `dpkg-deb --extract` unpacks. Everything happens in a staging directory, which
//! takes its final name only when it is complete, so an interrupted fetch leaves nothing behind
//! that would be mistaken for a guest.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The package that depends on the current cloud kernel.
const KERNEL_META: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";
const MODULES: &str = "modules";

/// Files of the default guest.
#[derive(Clone, Debug)]
pub(super) struct Packages {
    /// bzImage.
    pub(super) kernel: PathBuf,
    /// A static busybox.
    pub(super) busybox: PathBuf,
    /// The directory of the kernel's modules; it may be absent.
    pub(super) modules: PathBuf,
}

/// The default guest, from the cache or fetched now; where it can't be fetched, the host's own
/// kernel.
pub(super) fn default_guest() -> Result<Packages> {
    let home = cache_directory()?.join("debian-cloud");
    if let Some(packages) = complete(&home) {
        return Ok(packages);
    }
    match fetch(&home) {
        Ok(packages) => Ok(packages),
        Err(error) => host_guest().with_context(|| {
            format!(
                "fetching the default guest: {error:#}; and the host has no readable kernel with \
                 a static busybox of its own. Give --kernel and --initrd"
            )
        }),
    }
}

fn cache_directory() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME says where to keep the guest's kernel")?;
    Ok(base.join("fourfold"))
}

fn complete(home: &Path) -> Option<Packages> {
    let packages = Packages {
        kernel: home.join("vmlinuz"),
        busybox: home.join("busybox"),
        modules: home.join(MODULES),
    };
    let whole = packages.kernel.is_file() && packages.busybox.is_file();
    whole.then_some(packages)
}

fn fetch(home: &Path) -> Result<Packages> {
    let staging = home.with_extension(format!("fetching-{}", std::process::id()));
    let outcome = fetch_into(&staging).and_then(|()| {
        let _ = fs::remove_dir_all(home);
        fs::rename(&staging, home).with_context(|| format!("making {}", home.display()))
    });
    let _ = fs::remove_dir_all(&staging);
    match (outcome, complete(home)) {
        // Also where somebody else was faster.
        (_, Some(packages)) => Ok(packages),
        (Err(error), None) => Err(error),
        (Ok(()), None) => bail!("the packages hold no kernel or no busybox"),
    }
}

fn fetch_into(staging: &Path) -> Result<()> {
    let downloads = staging.join("downloads");
    fs::create_dir_all(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    let kernel = kernel_package()?;
    eprintln!("fourfold: first use: fetching {kernel} and {BUSYBOX} with apt-get download");
    let mut download = Command::new("apt-get");
    download
        .args(["download", "-q", &kernel, BUSYBOX])
        .current_dir(&downloads)
        .stdout(Stdio::from(std::io::stderr()));
    run(&mut download)?;
    eprintln!("fourfold: unpacking");
    let unpacked = staging.join("unpacked");
    for entry in fs::read_dir(&downloads)? {
        let mut extract = Command::new("dpkg-deb");
        extract.arg("--extract").arg(entry?.path()).arg(&unpacked);
        run(&mut extract)?;
    }
    keep(&unpacked, staging)?;
    fs::remove_dir_all(&unpacked)?;
    fs::remove_dir_all(&downloads)?;
    Ok(())
}

/// Moves what a guest needs out of the unpacked packages.
fn keep(unpacked: &Path, staging: &Path) -> Result<()> {
    let kernel = find(&unpacked.join("boot"), "vmlinuz-").context("no boot/vmlinuz-*")?;
    fs::rename(kernel, staging.join("vmlinuz"))?;
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .map(|path| unpacked.join(path))
        .into_iter()
        .find(|path| path.is_file());
    fs::rename(busybox.context("no bin/busybox")?, staging.join("busybox"))?;
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|path| find(&unpacked.join(path), ""));
    if let Some(modules) = modules {
        fs::rename(modules, staging.join(MODULES))?;
    }
    Ok(())
}

/// The first entry of `directory` whose name begins with `prefix`.
fn find(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?;
    let mut paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(prefix)
    })
}

/// The package that [`KERNEL_META`] depends on now.
fn kernel_package() -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", KERNEL_META])
        .env("LC_ALL", "C")
        .output()
        .context("apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    dependency(&text).with_context(|| {
        format!("the host's package lists have no {KERNEL_META}: run `sudo apt-get update`")
    })
}

fn dependency(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends:"))
        .map(|name| name.trim().to_owned())
        .find(|name| name.starts_with("linux-image-"))
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| name.clone())?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// The host's own kernel and busybox, where both can be read.
fn host_guest() -> Result<Packages> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    let kernel = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    fs::File::open(&kernel).with_context(|| kernel.display().to_string())?;
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| is_static(path))
        .context("no static busybox")?;
    Ok(Packages {
        kernel,
        busybox,
        modules: PathBuf::from(format!("/lib/modules/{release}")),
    })
}

/// Whether an ELF file names no interpreter.
fn is_static(path: &Path) -> bool {
    const INTERPRETERS: [&[u8]; 2] = [b"/ld-linux", b"/ld-musl"];
    fs::read(path).is_ok_and(|bytes| {
        let head = &bytes[..bytes.len().min(4096)];
        head.starts_with(b"\x7fELF")
            && !INTERPRETERS
                .iter()
                .any(|name| head.windows(name.len()).any(|window| window == *name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_package_is_found_among_dependencies() {
        let text = "linux-image-cloud-amd64\n  Depends: foo\n  Depends: linux-image-6.1.0-cloud\n";
        assert_eq!(dependency(text).unwrap(), "linux-image-6.1.0-cloud");
        assert_eq!(dependency("linux-image-cloud-amd64\n"), None);
    }
}
