//! The default initial RAM disk, written anew for each run: a cpio archive ("newc",
//! `Documentation/driver-api/early-userspace/buffer-format.rst`) with busybox, the virtio modules
//! and an init.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{fetch::Packages, modules, options::GuestFile};

const INIT: &str = include_str!("init.sh");
const INTERACTIVE: &str = include_str!("interactive.sh");
const EXEC: &str = include_str!("exec.sh");

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// What the user brings.
pub(super) struct Payload<'a> {
    /// A command to run, and to report how it ended; a shell where there is none.
    pub(super) command: Option<&'a str>,
    /// Files of the host's.
    pub(super) files: &'a [GuestFile],
}

/// The archive.
pub(super) fn build(
    packages: &Packages,
    kernel: KernelOrigin,
    payload: &Payload<'_>,
    nonce: &str,
) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for directory in ["bin", "dev", "proc", "sys", "tmp", "mnt", "root", "modules"] {
        archive.add(directory, DIRECTORY, &[]);
    }
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    let busybox = read(&packages.busybox)?;
    archive.add("bin/busybox", EXECUTABLE, &busybox);
    if kernel == KernelOrigin::Packages {
        add_modules(&mut archive, &packages.modules)?;
    }
    archive.add("init", EXECUTABLE, INIT.as_bytes());
    for file in payload.files {
        add_file(&mut archive, file)?;
    }
    match payload.command {
        None => archive.add("main", EXECUTABLE, INTERACTIVE.as_bytes()),
        Some(command) => {
            archive.add("main", EXECUTABLE, EXEC.as_bytes());
            archive.add("command", EXECUTABLE, command.as_bytes());
            archive.add("nonce", EXECUTABLE, nonce.as_bytes());
        }
    }
    Ok(archive.finish())
}

/// Whose kernel is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelOrigin {
    /// The one of the packages: its modules fit.
    Packages,
    /// The user's.
    User,
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

fn add_modules(archive: &mut Cpio, directory: &Path) -> Result<()> {
    for (number, module) in modules::wanted(directory)?.iter().enumerate() {
        let name = format!("modules/{number:02}-{}.ko", module.name);
        archive.add(&name, EXECUTABLE, &module.object);
    }
    Ok(())
}

/// Adds a file of the host's with the directories that lead to it; it may be run.
fn add_file(archive: &mut Cpio, file: &GuestFile) -> Result<()> {
    let name = file.guest.trim_matches('/');
    for (at, _) in name.match_indices('/') {
        archive.add(&name[..at], DIRECTORY, &[]);
    }
    archive.add(name, EXECUTABLE, &read(&file.host)?);
    Ok(())
}

/// A cpio archive being written.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, mode, content, (0, 0));
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, &[], (major, minor));
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let links = 1;
        let header = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in header {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(len, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut archive = Cpio::default();
        archive.add("dir", DIRECTORY, &[]);
        archive.add("dir/file", EXECUTABLE, b"content");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(bytes.len() % 4, 0);
        let second = 110 + 4 + 2;
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 110..second + 118], b"dir/file");
        assert!(bytes.windows(7).any(|window| window == b"content"));
    }
}
