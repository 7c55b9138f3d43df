//! PCI: configuration space, MSI-X, and a root bus with one host bridge.
//!
//! The bus is flat: bus 0, 32 slots, function 0 in each. Configuration space is reached by ports
//! 0xCF8/0xCFC and by ECAM; memory BARs lie in one window of the guest physical address space, and
//! [`root::PciRoot`] finds the device that decodes an address there.

pub mod config;
pub mod msix;
pub mod root;

pub use config::{Bar, ConfigSpace, Identity};
pub use root::PciRoot;

use addr::Gpa;

/// A function on the bus.
pub trait PciDevice: Send + Sync {
    /// Reads configuration space at `offset`; `data` never crosses a doubleword.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes it, likewise.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// The memory BARs as they are decoded now: none while memory decoding is off.
    fn decoded(&self) -> Vec<Bar>;
    /// Gives BAR `index` its first address, before the guest runs.
    fn place(&self, index: usize, at: Gpa);
    /// The sizes of the memory BARs: index and bytes.
    fn bar_sizes(&self) -> Vec<(usize, u64)>;
    /// Reads behind BAR `index`.
    fn read_bar(&self, index: usize, offset: u64, data: &mut [u8]);
    /// Writes behind BAR `index`.
    fn write_bar(&self, index: usize, offset: u64, data: &[u8]);
}
