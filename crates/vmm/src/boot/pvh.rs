//! The PVH boot protocol: start info, modules, memory map.

use addr::Gpa;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{Entry, Handover, put};
use crate::{error::BuildError, layout};

/// Offsets from the start info.
const MODULES: u64 = 0x100;
const MEMORY_MAP: u64 = 0x200;

/// Writes what the protocol wants in memory and gives the entry.
pub(super) fn prepare(
    memory: &GuestMemoryMmap,
    entry: Gpa,
    handover: &Handover,
) -> Result<Entry, BuildError> {
    let start_info = layout::BOOT_PARAMS;
    let at = |offset| Gpa::new(start_info.raw() + offset);
    let map = handover.map();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE.raw(),
        rsdp_paddr: layout::ACPI_TABLES.raw(),
        nr_modules: u32::from(handover.initrd.is_some()),
        modlist_paddr: at(MODULES).raw(),
        memmap_paddr: at(MEMORY_MAP).raw(),
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    put(memory, info.as_slice(), start_info, "PVH's start info")?;
    if let Some((initrd, len)) = handover.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.raw(),
            size: len,
            ..Default::default()
        };
        put(memory, module.as_slice(), at(MODULES), "PVH's modules")?;
    }
    for (i, entry) in (0..).zip(&map) {
        let row = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind as u32,
            reserved: 0,
        };
        let offset = MEMORY_MAP + i * size_of_val(&row) as u64;
        put(memory, row.as_slice(), at(offset), "PVH's memory map")?;
    }
    put(memory, &gdt(), layout::GDT, "the GDT")?;
    Ok(Entry::Pvh {
        rip: entry,
        start_info,
    })
}

/// Flat 32-bit segments.
fn gdt() -> Vec<u8> {
    const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    [0, 0, CODE_32, DATA]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect()
}
