//! `/proc/PID/maps`: which file, and where in it (the kernel's `Documentation/filesystems/proc.rst`).

use std::path::PathBuf;

use addr::{Hva, HvaRange};

use super::PagemapError;

/// What a process may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Load.
    pub read: bool,
    /// Store.
    pub write: bool,
    /// Run.
    pub execute: bool,
    /// Writes reach the file or the other processes that map it.
    pub shared: bool,
}

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where it is.
    pub range: HvaRange,
    /// What the process may do.
    pub permissions: Permissions,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file's device.
    pub device: Device,
    /// The file's number there; zero for anonymous memory.
    pub inode: u64,
    /// The file, or a name in brackets; none for plain anonymous memory.
    pub path: Option<PathBuf>,
}

impl Mapping {
    /// Whether a file is behind it (memfds are files, too).
    pub fn is_file(&self) -> bool {
        self.inode != 0
    }

    /// Where in the file a byte of the mapping is.
    pub fn file_offset(&self, hva: Hva) -> Option<u64> {
        let inside = self.range.offset_of(hva)?;
        self.is_file().then(|| self.offset + inside)
    }
}

pub(super) fn parse(text: &str) -> Result<Vec<Mapping>, PagemapError> {
    text.lines()
        .map(|line| parse_line(line).ok_or_else(|| PagemapError::Mapping { line: line.into() }))
        .collect()
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let (from, to) = field(&mut rest)?.split_once('-')?;
    let permissions = permissions(field(&mut rest)?)?;
    let offset = hexadecimal(field(&mut rest)?)?;
    let (major, minor) = field(&mut rest)?.split_once(':')?;
    let inode = field(&mut rest)?.parse().ok()?;
    // The rest of the line, which may hold blanks.
    let path = rest.trim_start();
    Some(Mapping {
        range: HvaRange::between(Hva::new(hexadecimal(from)?), Hva::new(hexadecimal(to)?))?,
        permissions,
        offset,
        device: Device {
            major: hexadecimal(major)?.try_into().ok()?,
            minor: hexadecimal(minor)?.try_into().ok()?,
        },
        inode,
        path: (!path.is_empty()).then(|| path.into()),
    })
}

/// The next word.
fn field<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let line = rest.trim_start();
    let end = line.find(' ').unwrap_or(line.len());
    let (word, behind) = line.split_at(end);
    *rest = behind;
    (!word.is_empty()).then_some(word)
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

fn permissions(text: &str) -> Option<Permissions> {
    match text.as_bytes() {
        [read, write, execute, shared] => Some(Permissions {
            read: *read == b'r',
            write: *write == b'w',
            execute: *execute == b'x',
            shared: *shared == b's',
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        let text = "7f0000000000-7f0000200000 rw-s 00100000 00:01 1033  /memfd:guest ram (deleted)\n\
                    7ffd1000-7ffd2000 r-xp 00000000 00:00 0    [vdso]\n\
                    ffffffffff600000-ffffffffff601000 --xp 00000000 fd:0a 0\n";
        let maps = parse(text).unwrap();
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].range.len(), 0x20_0000);
        assert!(maps[0].permissions.shared && maps[0].permissions.write);
        assert_eq!(maps[0].path, Some("/memfd:guest ram (deleted)".into()));
        assert_eq!(
            maps[0].file_offset(Hva::new(0x7f00_0000_1234)),
            Some(0x10_1234)
        );
        assert_eq!(maps[1].file_offset(Hva::new(0x7ffd_1000)), None);
        assert_eq!(
            maps[2].device,
            Device {
                major: 0xfd,
                minor: 0xa
            }
        );
        assert_eq!(maps[2].path, None);
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for bad in [
            "x",
            "1000-2000",
            "2000-1000 r--p 0 0:0 0",
            "1-2 r--p 0 0 0",
            "1-2 rwx 0 0:0 0",
        ] {
            assert!(
                matches!(parse(bad), Err(PagemapError::Mapping { .. })),
                "{bad}"
            );
        }
        assert_eq!(parse("").unwrap(), []);
    }
}
