//! What lies where in the guest physical address space.
//!
//! | from          | to            | what                                             |
//! |---------------|---------------|--------------------------------------------------|
//! | 0             | 0xa_0000      | RAM: boot data in its first pages                |
//! | 0xe_0000      | 0x10_0000     | RAM that holds the ACPI tables, reserved         |
//! | 0x10_0000     | 0xc000_0000   | RAM, as much as there is                         |
//! | 0xc000_0000   | 0xe000_0000   | PCI memory window                                |
//! | 0xe000_0000   | 0xe010_0000   | PCI ECAM, bus 0                                  |
//! | 0xfec0_0000   |               | IOAPIC                                           |
//! | 0xfee0_0000   |               | local APICs, MSI                                 |
//! | 0xfffb_c000   | 0xfffc_0000   | pages that VMX without unrestricted guests needs |
//! | 0x1_0000_0000 |               | the rest of RAM                                  |

use addr::{Gpa, GpaRange};

/// The GDT of the boot protocol.
pub(crate) const GDT: Gpa = Gpa::new(0x500);
/// The zero page, or PVH's start info.
pub(crate) const BOOT_PARAMS: Gpa = Gpa::new(0x7000);
/// The page tables of the boot protocol: one root, one directory of directories, four directories.
pub(crate) const PAGE_TABLES: Gpa = Gpa::new(0x9000);
/// The command line.
pub(crate) const COMMAND_LINE: Gpa = Gpa::new(0x2_0000);
/// Longest command line with its NUL: what Linux takes.
pub(crate) const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory; what follows belongs to firmware.
pub(crate) const CONVENTIONAL_END: Gpa = Gpa::new(0x9_fc00);
/// The ACPI tables, where a search for the RSDP would find it, too.
pub(crate) const ACPI_TABLES: Gpa = Gpa::new(0xe_0000);
/// Where memory above the first mebibyte begins.
pub(crate) const HIGH_MEMORY: Gpa = Gpa::new(0x10_0000);
/// Where a bzImage is loaded: its preferred address is this or above.
pub(crate) const KERNEL: Gpa = Gpa::new(0x100_0000);
/// The end of RAM below 4 GiB.
pub(crate) const LOW_RAM_END: Gpa = Gpa::new(0xc000_0000);
/// The start of RAM above 4 GiB.
pub(crate) const HIGH_RAM: Gpa = Gpa::new(0x1_0000_0000);
/// PCI ECAM.
pub(crate) const ECAM: Gpa = Gpa::new(0xe000_0000);
/// IOAPIC.
pub(crate) const IOAPIC: Gpa = Gpa::new(0xfec0_0000);
/// Local APICs.
pub(crate) const LOCAL_APIC: Gpa = Gpa::new(0xfee0_0000);
/// KVM's identity map page.
pub(crate) const IDENTITY_MAP: Gpa = Gpa::new(0xfffb_c000);
/// KVM's three pages of TSS.
pub(crate) const TSS: Gpa = Gpa::new(0xfffb_d000);
/// The interrupt by which ACPI tells of events.
pub(crate) const SCI: u16 = 9;

/// The window for PCI memory BARs.
pub(crate) fn pci_window() -> GpaRange {
    GpaRange::between(LOW_RAM_END, ECAM).expect("the window lies below ECAM")
}
