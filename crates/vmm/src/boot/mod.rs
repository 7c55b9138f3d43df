//! Boot protocols: what the kernel finds in memory, and where it is entered.
//!
//! | image            | protocol                                              | entry            |
//! |------------------|-------------------------------------------------------|------------------|
//! | bzImage          | Linux/x86 64-bit (`Documentation/arch/x86/boot.rst`)  | long mode        |
//! | ELF, PVH note    | PVH (`xen/include/public/arch-x86/hvm/start_info.h`)  | protected mode   |
//! | ELF without      | Linux/x86 64-bit                                      | long mode        |

mod linux;
mod payload;
mod pvh;

use std::{
    fs::{self, File},
    io::{self, Cursor, Read},
    path::{Path, PathBuf},
};

use addr::Gpa;
use linux_loader::loader::{
    self, BzImage, Elf, KernelLoader, KernelLoaderResult, elf::PvhBootCapability,
};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{config::Initrd, error::BuildError, layout, ram::Ram};

/// Where and how the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In long mode with an identity map, the zero page in RSI.
    Long {
        /// Instruction pointer.
        rip: Gpa,
        /// Boot parameters.
        zero_page: Gpa,
    },
    /// In 32-bit protected mode without paging, the start info in RBX.
    Pvh {
        /// Instruction pointer.
        rip: Gpa,
        /// Start info.
        start_info: Gpa,
    },
}

/// Why a kernel, an initrd or a command line can't be used.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file can't be read.
    #[error("{what} {}: {cause}", path.display())]
    File {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Not a kernel of a kind that can be booted.
    #[error("kernel {}: neither a bzImage nor an x86-64 ELF image (it begins with {begins:02x?})",
        path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Its first bytes.
        begins: Vec<u8>,
    },
    /// A bzImage whose header promises more than the file holds.
    #[error("kernel {}: the header promises {promised} bytes and the file has {actual}: \
        it is truncated", path.display())]
    Truncated {
        /// Which.
        path: PathBuf,
        /// Bytes by the header.
        promised: u64,
        /// Bytes in the file.
        actual: u64,
    },
    /// A kernel that can't be entered in long mode.
    #[error("kernel {}: it has no 64-bit entry (boot protocol {}.{:02}, xloadflags {flags:#x})",
        path.display(), version >> 8, version & 0xff)]
    No64BitEntry {
        /// Which.
        path: PathBuf,
        /// Boot protocol.
        version: u16,
        /// `xloadflags`.
        flags: u16,
    },
    /// The image is broken, or does not fit.
    #[error("kernel {}: {cause}", path.display())]
    Load {
        /// Which.
        path: PathBuf,
        /// What the loader says.
        cause: loader::Error,
    },
    /// The kernel inside a bzImage can't be unpacked.
    #[error("kernel {}: unpacking it: {cause}", path.display())]
    Payload {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Too little memory.
    #[error(
        "{what} needs memory up to {end}, and there is RAM up to {ram_end}: \
        give the machine more memory"
    )]
    TooSmall {
        /// What does.
        what: &'static str,
        /// The end of what it needs.
        end: Gpa,
        /// The end of RAM below the PCI window.
        ram_end: Gpa,
    },
    /// The command line is too long, or holds a NUL.
    #[error("the kernel command line has {len} bytes, and must have fewer than {most}, none NUL")]
    CommandLine {
        /// Its length.
        len: usize,
        /// The limit.
        most: usize,
    },
}

/// What the kernel is told, whatever the protocol.
pub(crate) struct Handover {
    pub(crate) initrd: Option<(Gpa, u64)>,
    pub(crate) command_line_len: usize,
    pub(crate) low_end: Gpa,
    pub(crate) high_size: u64,
}

/// Loads everything and says where to enter.
pub(crate) fn load(
    ram: &Ram,
    kernel: &Path,
    initrd: Option<&Initrd>,
    command_line: &str,
) -> Result<Entry, BuildError> {
    let memory = &ram.view;
    let image = Image::load(memory, kernel, ram.low_end())?;
    let initrd = initrd
        .map(|initrd| {
            load_initrd(
                memory,
                initrd,
                image.end,
                image.initrd_max.min(ram.low_end()),
            )
        })
        .transpose()?;
    write_command_line(memory, command_line)?;
    let handover = Handover {
        initrd,
        command_line_len: command_line.len(),
        low_end: ram.low_end(),
        high_size: ram.high_size(),
    };
    match image.kind {
        Kind::Pvh { entry } => pvh::prepare(memory, entry, &handover),
        Kind::Linux { entry, header } => linux::prepare(memory, entry, header, &handover),
    }
}

/// The ELF image inside a bzImage, as the guest would unpack it.
pub fn unpacked_kernel(path: &Path) -> Result<Vec<u8>, BootError> {
    let mut file = File::open(path).map_err(|cause| unreadable("kernel", path, cause))?;
    let (header, code) = linux::read_bzimage(&mut file, path)?;
    let unpacked = payload::unpack(&header, &code).unwrap_or_else(|| {
        let what = "it is packed in a way that only the guest knows";
        Err(io::Error::new(io::ErrorKind::Unsupported, what))
    });
    unpacked.map_err(|cause| BootError::Payload {
        path: path.to_owned(),
        cause,
    })
}

enum Kind {
    Linux {
        entry: Gpa,
        header: Option<loader::bootparam::setup_header>,
    },
    Pvh {
        entry: Gpa,
    },
}

struct Image {
    kind: Kind,
    /// The first address that it leaves free.
    end: Gpa,
    /// The initrd must end here or below.
    initrd_max: Gpa,
}

/// Offset of the 64-bit entry in a bzImage's protected-mode part.
const BZIMAGE_ENTRY_64: u64 = 0x200;

impl Image {
    fn load(memory: &GuestMemoryMmap, path: &Path, ram_end: Gpa) -> Result<Self, BootError> {
        let mut file = File::open(path).map_err(|cause| unreadable("kernel", path, cause))?;
        let mut begins = vec![0; 4];
        let read = file.read(&mut begins);
        begins.truncate(read.map_err(|cause| unreadable("kernel", path, cause))?);
        if begins == *b"\x7fELF" {
            Self::load_elf(memory, path, &mut file, ram_end)
        } else if linux::is_bzimage(&file) {
            Self::load_bzimage(memory, path, &mut file, ram_end)
        } else {
            let path = path.to_owned();
            Err(BootError::Format { path, begins })
        }
    }

    fn load_elf(
        memory: &GuestMemoryMmap,
        path: &Path,
        file: &mut File,
        ram_end: Gpa,
    ) -> Result<Self, BootError> {
        let high = Some(GuestAddress(layout::HIGH_MEMORY.raw()));
        let loaded = Elf::load(memory, None, file, high).map_err(|c| broken(path, c))?;
        let end = fits("the kernel", loaded.kernel_end, ram_end)?;
        let kind = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Kind::Pvh {
                entry: Gpa::new(entry.0),
            },
            _ => Kind::Linux {
                entry: Gpa::new(loaded.kernel_load.0),
                header: None,
            },
        };
        Ok(Self {
            kind,
            end,
            initrd_max: layout::LOW_RAM_END,
        })
    }

    fn load_bzimage(
        memory: &GuestMemoryMmap,
        path: &Path,
        file: &mut File,
        ram_end: Gpa,
    ) -> Result<Self, BootError> {
        let (header, code) = linux::read_bzimage(file, path)?;
        let initrd_max = Gpa::new(u64::from(header.initrd_addr_max) + 1);
        if let Some(unpacked) = payload::unpack(&header, &code) {
            let elf = unpacked.map_err(|cause| BootError::Payload {
                path: path.to_owned(),
                cause,
            })?;
            let loaded = Elf::load(memory, None, &mut Cursor::new(elf), None);
            let loaded = loaded.map_err(|c| broken(path, c))?;
            return Ok(Self {
                end: fits("the kernel", loaded.kernel_end, ram_end)?,
                kind: Kind::Linux {
                    entry: Gpa::new(loaded.kernel_load.0),
                    header: Some(header),
                },
                initrd_max,
            });
        }
        let start = match header.relocatable_kernel {
            0 => Gpa::new(header.pref_address),
            _ => layout::KERNEL.max(Gpa::new(header.pref_address)),
        };
        let needed = start.raw().saturating_add(u64::from(header.init_size));
        let end = fits("the kernel", needed, ram_end)?;
        let at = Some(GuestAddress(start.raw()));
        let loaded: KernelLoaderResult =
            BzImage::load(memory, at, file, None).map_err(|c| broken(path, c))?;
        Ok(Self {
            kind: Kind::Linux {
                entry: Gpa::new(start.raw() + BZIMAGE_ENTRY_64),
                header: loaded.setup_header,
            },
            end,
            initrd_max,
        })
    }
}

fn unreadable(what: &'static str, path: &Path, cause: io::Error) -> BootError {
    let path = path.to_owned();
    BootError::File { what, path, cause }
}

fn broken(path: &Path, cause: loader::Error) -> BootError {
    let path = path.to_owned();
    BootError::Load { path, cause }
}

fn fits(what: &'static str, end: u64, ram_end: Gpa) -> Result<Gpa, BootError> {
    let end = Gpa::new(end);
    if end > ram_end {
        return Err(BootError::TooSmall { what, end, ram_end });
    }
    Ok(end)
}

/// Puts the initrd as high as it may lie, on a page of its own, above the kernel.
fn load_initrd(
    memory: &GuestMemoryMmap,
    initrd: &Initrd,
    kernel_end: Gpa,
    max: Gpa,
) -> Result<(Gpa, u64), BuildError> {
    const PAGE: u64 = 4096;
    let read;
    let bytes = match initrd {
        Initrd::Bytes(bytes) => bytes,
        Initrd::File(path) => {
            read = fs::read(path).map_err(|cause| unreadable("initrd", path, cause))?;
            &read
        }
    };
    let len = bytes.len() as u64;
    let start = max.raw().checked_sub(len).map(|at| at / PAGE * PAGE);
    let start = start.filter(|at| *at >= kernel_end.raw());
    let start = start.ok_or(BootError::TooSmall {
        what: "the kernel with its initrd",
        end: Gpa::new(kernel_end.raw().saturating_add(len)),
        ram_end: max,
    })?;
    put(memory, bytes, Gpa::new(start), "the initrd")?;
    Ok((Gpa::new(start), len))
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(), BuildError> {
    let most = layout::COMMAND_LINE_MAX;
    if line.len() >= most || line.contains('\0') {
        let len = line.len();
        return Err(BootError::CommandLine { len, most }.into());
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    put(memory, &bytes, layout::COMMAND_LINE, "the command line")
}

/// Writes boot data.
fn put(
    memory: &GuestMemoryMmap,
    bytes: &[u8],
    gpa: Gpa,
    what: &'static str,
) -> Result<(), BuildError> {
    memory
        .write_slice(bytes, GuestAddress(gpa.raw()))
        .map_err(|_| BuildError::Write { what, gpa })
}

/// A range of the memory map that the kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) kind: MapKind,
}

/// What a range is; the numbers are those of E820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum MapKind {
    Ram = 1,
    Reserved = 2,
}

impl Handover {
    /// The memory map.
    pub(crate) fn map(&self) -> Vec<MapEntry> {
        let between = |start: Gpa, end: Gpa, kind| MapEntry {
            start: start.raw(),
            len: end.raw() - start.raw(),
            kind,
        };
        let ecam_end = Gpa::new(layout::ECAM.raw() + devices::pci::root::ECAM_SIZE);
        let mut map = vec![
            between(Gpa::new(0), layout::CONVENTIONAL_END, MapKind::Ram),
            between(
                layout::CONVENTIONAL_END,
                Gpa::new(0xa_0000),
                MapKind::Reserved,
            ),
            between(layout::ACPI_TABLES, layout::HIGH_MEMORY, MapKind::Reserved),
            between(layout::HIGH_MEMORY, self.low_end, MapKind::Ram),
            between(layout::ECAM, ecam_end, MapKind::Reserved),
        ];
        if self.high_size > 0 {
            map.push(MapEntry {
                start: layout::HIGH_RAM.raw(),
                len: self.high_size,
                kind: MapKind::Ram,
            });
        }
        map
    }
}
