//! The Linux/x86 64-bit boot protocol: header checks, zero page, GDT, identity map.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::Path,
};

use addr::Gpa;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{BootError, Entry, Handover, put};
use crate::{error::BuildError, layout};

const HEADER_OFFSET: u64 = 0x1f1;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const MAGIC_OFFSET: u64 = 0x202;
/// Protocol 2.12 introduced `xloadflags`.
const LEAST_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;
/// `syssize` counts in these.
const PARAGRAPH: u64 = 16;
/// "Undefined" type of loader.
const LOADER: u8 = 0xff;
/// `loadflags`: the heap pointer is valid; so is 0 for "no heap".
const LOADED_HIGH: u8 = 1;

/// Whether the file has a bzImage's magic number.
pub(super) fn is_bzimage(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, MAGIC_OFFSET).is_ok() && u32::from_le_bytes(magic) == MAGIC
}

/// The setup header of a bzImage that is whole and has a 64-bit entry.
fn checked_header(file: &File, path: &Path) -> Result<setup_header, BootError> {
    let unreadable = |cause| super::unreadable("kernel", path, cause);
    let actual = file.metadata().map_err(unreadable)?.len();
    let truncated = |promised| BootError::Truncated {
        path: path.to_owned(),
        promised,
        actual,
    };
    let mut header = setup_header::default();
    let header_end = HEADER_OFFSET + size_of_val(&header) as u64;
    if actual < header_end {
        return Err(truncated(header_end));
    }
    file.read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        .map_err(unreadable)?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < LEAST_VERSION || flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry {
            path: path.to_owned(),
            version,
            flags,
        });
    }
    let promised = setup_size(&header) + u64::from(header.syssize) * PARAGRAPH;
    // The last paragraph may be cut.
    if actual + PARAGRAPH <= promised {
        return Err(truncated(promised));
    }
    Ok(header)
}

/// The setup header and the protected-mode part behind it.
pub(super) fn read_bzimage(
    file: &mut File,
    path: &Path,
) -> Result<(setup_header, Vec<u8>), BootError> {
    let header = checked_header(file, path)?;
    let mut code = Vec::new();
    file.seek(SeekFrom::Start(setup_size(&header)))
        .and_then(|_| file.read_to_end(&mut code))
        .map_err(|cause| super::unreadable("kernel", path, cause))?;
    Ok((header, code))
}

/// Bytes of the real-mode part, in front of the protected-mode part.
fn setup_size(header: &setup_header) -> u64 {
    // 0 stands for what the first versions of the protocol had.
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    (sectors + 1) * SECTOR
}

/// Writes what the protocol wants in memory and gives the entry.
pub(super) fn prepare(
    memory: &GuestMemoryMmap,
    entry: Gpa,
    header: Option<setup_header>,
    handover: &Handover,
) -> Result<Entry, BuildError> {
    let zero_page = zero_page(header, handover);
    put(
        memory,
        zero_page.as_slice(),
        layout::BOOT_PARAMS,
        "the zero page",
    )?;
    put(memory, &gdt(), layout::GDT, "the GDT")?;
    put(
        memory,
        &identity_map(),
        layout::PAGE_TABLES,
        "the page tables",
    )?;
    Ok(Entry::Long {
        rip: entry,
        zero_page: layout::BOOT_PARAMS,
    })
}

fn zero_page(header: Option<setup_header>, handover: &Handover) -> boot_params {
    let mut params = boot_params {
        hdr: header.unwrap_or_else(header_for_elf),
        acpi_rsdp_addr: layout::ACPI_TABLES.raw(),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE.raw() as u32;
    params.hdr.cmdline_size = handover.command_line_len as u32;
    if let Some((start, len)) = handover.initrd {
        params.hdr.ramdisk_image = start.raw() as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let map = handover.map();
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: entry.kind as u32,
        };
    }
    params.e820_table = table;
    params
}

/// What a bzImage's header would say, for an image without one.
fn header_for_elf() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: MAGIC,
        version: LEAST_VERSION,
        loadflags: LOADED_HIGH,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    }
}

/// Flat segments where the protocol wants them: code at 0x10, data at 0x18.
fn gdt() -> Vec<u8> {
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    [0, 0, CODE_64, DATA]
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .collect()
}

/// The first 4 GiB at themselves, in 2 MiB pages: a root, a table of directories, four directories.
fn identity_map() -> Vec<u8> {
    const PAGE: u64 = 4096;
    const ENTRIES: u64 = 512;
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1000_0011;
    const DIRECTORIES: u64 = 4;
    let root = layout::PAGE_TABLES.raw();
    let (pointers, directories) = (root + PAGE, root + 2 * PAGE);
    let root_table = [pointers | TABLE].into_iter().chain(std::iter::repeat(0));
    let pointer_table = (0..DIRECTORIES)
        .map(|i| (directories + i * PAGE) | TABLE)
        .chain(std::iter::repeat(0));
    let large_pages = (0..DIRECTORIES * ENTRIES).map(|i| i << 21 | LARGE_PAGE);
    root_table
        .take(ENTRIES as usize)
        .chain(pointer_table.take(ENTRIES as usize))
        .chain(large_pages)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_tells_command_line_initrd_and_memory() {
        let handover = Handover {
            initrd: Some((Gpa::new(0x700_0000), 0x1234)),
            command_line_len: 7,
            low_end: layout::LOW_RAM_END,
            high_size: 1 << 30,
        };
        let page = zero_page(None, &handover);
        let (image, size) = (page.hdr.ramdisk_image, page.hdr.ramdisk_size);
        assert_eq!((image, size), (0x700_0000, 0x1234));
        let table = page.e820_table;
        let ram: u64 = table[..usize::from(page.e820_entries)]
            .iter()
            .filter(|e| e.r#type == 1)
            .map(|e| e.size)
            .sum();
        let holes = (0xa_0000 - layout::CONVENTIONAL_END.raw()) + 0x6_0000;
        assert_eq!(ram, (3 << 30) - holes + (1 << 30));
    }

    #[test]
    fn the_identity_map_reaches_its_last_page() {
        let tables = identity_map();
        assert_eq!(tables.len(), 6 * 4096);
        let entry = |at: usize| u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
        assert_eq!(entry(0), (layout::PAGE_TABLES.raw() + 0x1000) | 3);
        assert_eq!(entry(tables.len() - 8), 0xffe0_0083);
    }
}
