//! What a machine is made of.

use std::{io::Write, path::PathBuf};

use devices::virtio::VirtioDevice;

/// Where a serial port's output goes.
pub type SerialOutput = Box<dyn Write + Send>;

/// The initial RAM disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Initrd {
    /// A file.
    File(PathBuf),
    /// Bytes made by the caller.
    Bytes(Vec<u8>),
}

/// A machine to build.
pub struct MachineConfig {
    /// Its name, for messages.
    pub name: String,
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// bzImage or ELF (Linux or PVH).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<Initrd>,
    /// The kernel's command line.
    pub command_line: String,
    /// Output of COM1, COM2 and COM3.
    pub serial: [SerialOutput; 3],
    /// Virtio devices, in the order of their PCI slots.
    pub virtio: Vec<Box<dyn VirtioDevice>>,
}
