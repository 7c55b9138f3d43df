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
pub(super) const DEFAULT_KERNEL: &str = "linux-image-cloud-amd64";
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

/// The guest with the kernel of Debian's package `kernel`, from the cache or fetched now; where the
/// default one can't be fetched, the host's own kernel.
pub(super) fn guest(kernel: &str) -> Result<Packages> {
    check_name(kernel)?;
    let home = cache_directory()?.join(match kernel {
        DEFAULT_KERNEL => "debian-cloud",
        other => other,
    });
    if let Some(packages) = complete(&home) {
        return Ok(packages);
    }
    let failure = match fetch(&home, kernel) {
        Ok(packages) => return Ok(packages),
        Err(failure) => failure,
    };
    if kernel != DEFAULT_KERNEL {
        return Err(failure.context(format!("fetching {kernel}")));
    }
    match host_guest(Path::new("/")) {
        Ok(packages) => {
            eprintln!(
                "fourfold: fetching the default guest: {failure:#}; using the host's own {}",
                packages.kernel.display()
            );
            Ok(packages)
        }
        Err(missing) => bail!(
            "fetching the default guest: {failure:#}; and the host's own kernel can't be used: \
             {missing:#}. Give --kernel and --initrd"
        ),
    }
}

/// The name becomes part of a path and of a command line.
fn check_name(package: &str) -> Result<()> {
    let is_of_a_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    if !package.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !package.chars().all(is_of_a_name)
    {
        bail!("--kernel-package {package}: this is no name of a package");
    }
    Ok(())
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

fn fetch(home: &Path, kernel: &str) -> Result<Packages> {
    let staging = home.with_extension(format!("fetching-{}", std::process::id()));
    let outcome = fetch_into(&staging, kernel).and_then(|()| {
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

fn fetch_into(staging: &Path, kernel: &str) -> Result<()> {
    let downloads = staging.join("downloads");
    fs::create_dir_all(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    let kernel = kernel_package(kernel)?;
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

/// The package that `meta` depends on now; `meta` itself, where it is no meta package.
fn kernel_package(meta: &str) -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", meta])
        .env("LC_ALL", "C")
        .output()
        .context("apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match dependency(&text) {
        Some(package) => Ok(package),
        None if text.starts_with(meta) => Ok(meta.to_owned()),
        None => bail!("the host's package lists have no {meta}: run `sudo apt-get update`"),
    }
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

/// The host's own kernel and busybox below `root`, where both can be read: the running kernel, or
/// else the newest of which there are modules.
fn host_guest(root: &Path) -> Result<Packages> {
    let running = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut releases = kernels(&root.join("boot"));
    releases.sort_by_key(|release| (release == running.trim(), release.clone()));
    let is_usable = |release: &&String| {
        let kernel = root.join(format!("boot/vmlinuz-{release}"));
        fs::File::open(kernel).is_ok() && modules_of(root, release).is_dir()
    };
    let release = releases.iter().rev().find(is_usable).with_context(|| {
        let boot = root.join("boot");
        format!("no readable {}/vmlinuz-* with its modules", boot.display())
    })?;
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| is_static(path))
        .context("no static busybox (Debian's package busybox-static)")?;
    Ok(Packages {
        kernel: root.join(format!("boot/vmlinuz-{release}")),
        busybox,
        modules: modules_of(root, release),
    })
}

fn modules_of(root: &Path, release: &str) -> PathBuf {
    root.join("lib/modules").join(release)
}

/// The releases of the kernels in a boot directory.
fn kernels(boot: &Path) -> Vec<String> {
    let entries = fs::read_dir(boot).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned))
        .collect()
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
    fn the_hosts_kernel_is_taken_where_it_is_whole() {
        let root = env::temp_dir().join(format!("fourfold-host-{}", std::process::id()));
        let boot = root.join("boot");
        fs::create_dir_all(&boot).unwrap();
        fs::create_dir_all(root.join("bin")).unwrap();
        let missing = |root: &Path| format!("{:#}", host_guest(root).unwrap_err());
        assert!(missing(&root).contains("no readable"));
        fs::write(boot.join("vmlinuz-6.1"), b"kernel").unwrap();
        assert!(missing(&root).contains("with its modules"));
        fs::create_dir_all(root.join("lib/modules/6.1")).unwrap();
        fs::write(root.join("bin/busybox"), b"\x7fELF /lib64/ld-linux").unwrap();
        assert!(missing(&root).contains("no static busybox"));
        fs::write(root.join("bin/busybox"), b"\x7fELF all in one").unwrap();
        assert_eq!(host_guest(&root).unwrap().kernel, boot.join("vmlinuz-6.1"));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn names_of_packages_lead_nowhere_else() {
        check_name("linux-image-6.12-cloud-amd64").unwrap();
        for wrong in ["", "../x", "-o=x", "a/b", "A B"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_kernels_package_is_found_among_dependencies() {
        let text = "linux-image-cloud-amd64\n  Depends: foo\n  Depends: linux-image-6.1.0-cloud\n";
        assert_eq!(dependency(text).unwrap(), "linux-image-6.1.0-cloud");
        assert_eq!(dependency("linux-image-cloud-amd64\n"), None);
    }
}
