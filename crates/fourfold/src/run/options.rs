//! The options of `run`, from the command line and from a TOML file, checked once.

use std::{fs, path::PathBuf, str::FromStr, time::Duration};

use accel::{Preference, user};
use anyhow::{Context, Result, bail};
use clap::Args;
use control::Wanted;
use devices::virtio::blk::DiskAccess;
use kvm::{BlockLength, PagingPath};
use serde::Deserialize;

use super::fetch;

const DEFAULT_MEMORY: u64 = 512 << 20;

/// Options of `run`. Each may also stand in a file, under the same name; the command line wins.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct RunOptions {
    /// Read options from this TOML file
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Kernel: bzImage, or ELF for Linux or PVH [default: Debian's cloud kernel, fetched once]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Take the kernel from this Debian package instead [default: linux-image-cloud-amd64]
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    kernel_package: Option<String>,
    /// Initial RAM disk [default without --kernel: busybox]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Add this to the kernel's command line
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
    /// Memory, in bytes or with K, M or G [default: 512M]
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, short, value_name = "N")]
    cpus: Option<u8>,
    /// Accelerator: auto, kvm or user [default: auto]
    #[arg(long, value_name = "NAME")]
    accel: Option<String>,
    /// What `user` translates with: nested, shadow or direct [default: nested]
    #[arg(long, value_name = "NAME")]
    paging: Option<String>,
    /// Attach a raw disk image, as /dev/vda and so on
    #[arg(long = "disk", value_name = "FILE[,readonly]")]
    disk: Vec<String>,
    /// Put a file of the host's into the default initial RAM disk [default place: /root]
    #[arg(long = "file", value_name = "FILE[:GUEST_PATH]")]
    file: Vec<String>,
    /// Where the serial console goes: stdio, none or `file:PATH` [default: stdio; with --exec: none]
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// Give the guest a virtio console (/dev/hvc0), too: stdio, none or `file:PATH`
    #[arg(long, value_name = "WHERE")]
    virtio_console: Option<String>,
    /// The name by which other commands find the machine [default: guest-PID]
    #[arg(long)]
    name: Option<String>,
    /// Start with the vCPUs stopped, until `fourfold resume`
    #[arg(long)]
    paused: bool,
    /// Run this command in the guest; its output and exit code become fourfold's
    #[arg(long, value_name = "COMMAND")]
    exec: Option<String>,
    /// Boot this many times in a row, until one boot fails
    #[arg(long, value_name = "N")]
    boots: Option<u32>,
    /// Debug Fourfold itself; `one-instruction` has `user` translate each instruction by itself
    #[arg(long, value_name = "MODE")]
    debug: Option<String>,
    /// Stop the machine after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// The same, checked.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) kernel: Option<PathBuf>,
    pub(super) kernel_package: String,
    pub(super) initrd: Option<PathBuf>,
    pub(super) files: Vec<GuestFile>,
    append: Option<String>,
    pub(super) memory: u64,
    pub(super) cpus: u8,
    pub(super) accel: Preference,
    pub(super) disks: Vec<Disk>,
    pub(super) serial: SerialTarget,
    pub(super) virtio_console: Option<SerialTarget>,
    pub(super) name: Name,
    pub(super) start: Wanted,
    pub(super) exec: Option<String>,
    pub(super) timeout: Option<Duration>,
    pub(super) boots: u32,
}

/// How a machine came to its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// By the user: it must be that one.
    Given(String),
    /// By us.
    Made(String),
}

impl Name {
    /// The name.
    pub(super) fn as_str(&self) -> &str {
        match self {
            Self::Given(name) | Self::Made(name) => name,
        }
    }
}

/// Where COM1 goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SerialTarget {
    /// The terminal.
    Stdio,
    /// Nowhere.
    None,
    /// A file.
    File(PathBuf),
}

/// A file for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestFile {
    pub(super) host: PathBuf,
    /// Its path in the guest.
    pub(super) guest: String,
}

/// A disk image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) access: DiskAccess,
}

impl RunOptions {
    /// Whether a command is to be run.
    pub(super) fn is_exec(&self) -> bool {
        self.exec.is_some()
    }

    /// Reads the file, if one is named, and checks everything.
    pub(super) fn plan(self) -> Result<Plan> {
        let options = match self.config.clone() {
            Some(path) => {
                let from = || format!("--config {}", path.display());
                let text = fs::read_to_string(&path).with_context(from)?;
                let file = toml::from_str(&text).with_context(from)?;
                self.over(file)
            }
            None => self,
        };
        options.check()
    }

    /// These options, and those of `file` where these say nothing.
    fn over(self, file: Self) -> Self {
        Self {
            config: self.config,
            kernel: self.kernel.or(file.kernel),
            kernel_package: self.kernel_package.or(file.kernel_package),
            initrd: self.initrd.or(file.initrd),
            append: self.append.or(file.append),
            memory: self.memory.or(file.memory),
            cpus: self.cpus.or(file.cpus),
            accel: self.accel.or(file.accel),
            paging: self.paging.or(file.paging),
            disk: if self.disk.is_empty() {
                file.disk
            } else {
                self.disk
            },
            file: if self.file.is_empty() {
                file.file
            } else {
                self.file
            },
            serial: self.serial.or(file.serial),
            virtio_console: self.virtio_console.or(file.virtio_console),
            name: self.name.or(file.name),
            paused: self.paused || file.paused,
            exec: self.exec.or(file.exec),
            boots: self.boots.or(file.boots),
            debug: self.debug.or(file.debug),
            timeout: self.timeout.or(file.timeout),
        }
    }

    fn check(self) -> Result<Plan> {
        if self.exec.is_some() && self.initrd.is_some() {
            bail!("--exec runs in the default initial RAM disk: leave --initrd out");
        }
        if !self.file.is_empty() && self.initrd.is_some() {
            bail!("--file goes into the default initial RAM disk: leave --initrd out");
        }
        let virtio_console = self.virtio_console.as_deref().map(console_target);
        let virtio_console = virtio_console.transpose()?;
        let has_terminal = virtio_console == Some(SerialTarget::Stdio);
        if has_terminal && self.exec.is_some() {
            bail!("--virtio-console stdio: standard output is that of --exec's command");
        }
        if has_terminal && self.serial.as_deref() == Some("stdio") {
            bail!("--virtio-console stdio: the terminal is the serial port's");
        }
        let default_serial = if self.exec.is_some() || has_terminal {
            "none"
        } else {
            "stdio"
        };
        Ok(Plan {
            memory: self.memory.as_deref().map_or(Ok(DEFAULT_MEMORY), size)?,
            cpus: self.cpus.unwrap_or(1),
            accel: preference(
                self.accel.as_deref(),
                self.paging.as_deref(),
                self.debug.as_deref(),
            )?,
            disks: self.disk.iter().map(|disk| Disk::parse(disk)).collect(),
            serial: self.serial.as_deref().unwrap_or(default_serial).parse()?,
            virtio_console,
            name: match self.name {
                Some(name) => Name::Given(name),
                None => Name::Made(format!("guest-{}", std::process::id())),
            },
            start: if self.paused {
                Wanted::Paused
            } else {
                Wanted::Running
            },
            kernel: self.kernel,
            kernel_package: self
                .kernel_package
                .unwrap_or_else(|| fetch::DEFAULT_KERNEL.to_owned()),
            files: self
                .file
                .iter()
                .map(|file| GuestFile::parse(file))
                .collect::<Result<_>>()?,
            boots: self.boots.unwrap_or(1),
            initrd: self.initrd,
            append: self.append,
            exec: self.exec,
            timeout: self.timeout.map(Duration::from_secs),
        })
    }
}

impl Plan {
    /// Whether one of the guest's consoles is the terminal.
    pub(super) fn has_terminal(&self) -> bool {
        self.serial == SerialTarget::Stdio || self.virtio_console == Some(SerialTarget::Stdio)
    }

    /// The kernel's command line: ours, then the user's, which therefore wins.
    pub(super) fn command_line(&self) -> String {
        let mut line = "console=ttyS0 panic=-1".to_owned();
        if self.exec.is_some() {
            line.push_str(" quiet");
        }
        if self.virtio_console == Some(SerialTarget::Stdio) {
            line.push_str(" console=hvc0");
        }
        if let Some(append) = &self.append {
            line.push(' ');
            line.push_str(append);
        }
        line
    }
}

impl Disk {
    fn parse(text: &str) -> Self {
        let (path, access) = match text.strip_suffix(",readonly") {
            Some(path) => (path, DiskAccess::ReadOnly),
            None => (text, DiskAccess::ReadWrite),
        };
        Self {
            path: path.into(),
            access,
        }
    }
}

impl GuestFile {
    fn parse(text: &str) -> Result<Self> {
        let (host, guest) = if let Some((host, guest)) = text.split_once(':') {
            (PathBuf::from(host), guest.to_owned())
        } else {
            let host = PathBuf::from(text);
            let name = host.file_name().context("it names no file");
            let name = name.with_context(|| format!("--file {text}"))?;
            let guest = format!("/root/{}", name.to_string_lossy());
            (host, guest)
        };
        if guest.split('/').any(|part| part == "..") || guest.trim_matches('/').is_empty() {
            bail!("--file {text}: {guest:?} is no path of a file in the guest");
        }
        Ok(Self { host, guest })
    }
}

impl FromStr for SerialTarget {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match (text, text.strip_prefix("file:")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("none", _) => Ok(Self::None),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => bail!("--serial {text}: there are `stdio`, `none` and `file:PATH`"),
        }
    }
}

fn console_target(text: &str) -> Result<SerialTarget> {
    let target = text.parse();
    target.ok().with_context(|| {
        format!("--virtio-console {text}: there are `stdio`, `none` and `file:PATH`")
    })
}

/// A size in bytes, or with a suffix.
fn size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .with_context(|| format!("--memory {text}: give bytes, or a number with K, M or G"))
}

fn preference(
    accel: Option<&str>,
    paging: Option<&str>,
    debug: Option<&str>,
) -> Result<Preference> {
    let blocks = match debug {
        None => BlockLength::Whole,
        Some("one-instruction") => BlockLength::OneInstruction,
        Some(other) => bail!("--debug {other}: there is `one-instruction`"),
    };
    let user = |paging| {
        Preference::User(user::Config {
            paging,
            blocks,
            ..user::Config::default()
        })
    };
    let paging = match paging {
        None => None,
        Some("nested") => Some(PagingPath::Nested),
        Some("shadow") => Some(PagingPath::Shadow),
        Some("direct") => Some(PagingPath::Direct),
        Some(other) => bail!("--paging {other}: there are `nested`, `shadow` and `direct`"),
    };
    match (accel.unwrap_or("auto"), paging) {
        ("auto", None) if debug.is_none() => Ok(Preference::Auto),
        ("kvm", None) if debug.is_some() => bail!("--debug is for `user`"),
        ("auto" | "user", Some(paging)) => Ok(user(paging)),
        ("auto" | "user", None) => Ok(user(PagingPath::default())),
        ("kvm", None) => Ok(Preference::Kernel),
        ("kvm", Some(_)) => bail!("--paging is for `user`: with --accel kvm the kernel decides"),
        (other, _) => bail!("--accel {other}: there are `auto`, `kvm` and `user`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_toml(text: &str) -> Result<Plan> {
        let file: RunOptions = toml::from_str(text)?;
        RunOptions::default().over(file).check()
    }

    #[test]
    fn sizes_have_suffixes_and_limits() {
        assert_eq!(size("4096").unwrap(), 4096);
        assert_eq!(size("2G").unwrap(), 2 << 30);
        for wrong in ["", "G", "1T", "-1", "99999999999999G", "½G"] {
            let message = size(wrong).unwrap_err().to_string();
            assert!(message.contains(&format!("--memory {wrong}")), "{message}");
        }
    }

    #[test]
    fn a_file_gives_what_the_command_line_leaves_open() {
        let file = r#"
            memory = "1G"
            cpus = 4
            disk = ["a.img", "b.img,readonly"]
        "#;
        let file: RunOptions = toml::from_str(file).unwrap();
        let line = RunOptions {
            cpus: Some(2),
            ..RunOptions::default()
        };
        let plan = line.over(file).check().unwrap();
        assert_eq!((plan.memory, plan.cpus), (1 << 30, 2));
        let access: Vec<_> = plan.disks.iter().map(|disk| disk.access).collect();
        assert_eq!(access, [DiskAccess::ReadWrite, DiskAccess::ReadOnly]);
    }

    /// Every option of the command line is a key of the file, under its own name.
    #[test]
    fn a_file_has_the_options_of_the_command_line() {
        let command = RunOptions::augment_args(clap::Command::new("run"));
        let mut names: Vec<_> = command
            .get_arguments()
            .filter_map(|a| a.get_long())
            .collect();
        names.retain(|name| *name != "config");
        assert!(
            names.contains(&"kernel-package") && names.len() > 15,
            "{names:?}"
        );
        for name in names {
            let taken = ["\"x\"", "1", "true", "[\"x\"]"]
                .iter()
                .any(|value| toml::from_str::<RunOptions>(&format!("{name} = {value}")).is_ok());
            assert!(taken, "{name} is no key of the file");
        }
    }

    /// Whole files with some bytes changed: an error with words, or a plan, but no panic.
    #[test]
    fn broken_files_are_refused_or_understood() {
        let whole = "memory = \"1G\"\ncpus = 4\ndisk = [\"a.img\", \"b.img,readonly\"]\n\
            paging = \"shadow\"\nserial = \"file:x\"\nfile = [\"a:/b\"]\nboots = 3\n";
        let mut state = 1_u64;
        let mut below = |end: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % end
        };
        let mut refused = 0;
        for _ in 0..5000 {
            let mut bytes = whole.as_bytes().to_vec();
            for _ in 0..=below(3) {
                let at = below(bytes.len());
                bytes[at] = below(128) as u8;
            }
            bytes.truncate(1 + below(2 * bytes.len()));
            match from_toml(&String::from_utf8_lossy(&bytes)) {
                Ok(_) => {}
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
            }
        }
        assert!(
            (100..5000).contains(&refused),
            "{refused} of 5000 were refused"
        );
    }

    #[test]
    fn wrong_values_are_named_with_the_right_ones() {
        for (text, expected) in [
            ("cpu = 3", "unknown field"),
            ("memory = 512", "invalid type"),
            ("paging = \"flat\"", "`shadow`"),
            ("accel = \"hvf\"", "`user`"),
            ("accel = \"kvm\"\npaging = \"nested\"", "the kernel decides"),
            ("serial = \"tcp\"", "file:PATH"),
            ("virtio-console = \"tcp\"", "--virtio-console tcp"),
            ("virtio-console = \"stdio\"\nexec = \"id\"", "--exec"),
            (
                "virtio-console = \"stdio\"\nserial = \"stdio\"",
                "the serial port's",
            ),
            ("exec = \"id\"\ninitrd = \"x\"", "--initrd"),
            ("memory = ", "TOML"),
        ] {
            let message = format!("{:#}", from_toml(text).unwrap_err());
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
