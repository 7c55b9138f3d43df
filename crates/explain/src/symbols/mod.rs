//! Names of the guest kernel's functions and data, and where they lie.
//!
//! | source                | where the names are                                            |
//! |-----------------------|----------------------------------------------------------------|
//! | `System.map`          | lines of address, kind, name                                   |
//! | `vmlinux` with symbols | the ELF symbol table                                          |
//! | any kernel image      | the kernel's own table, `kallsyms`, packed in its data         |
//!
//! A kernel that has moved itself (KASLR) is found by its page fault handler: the guest's IDT says
//! where `asm_exc_page_fault` is, and the table where it was linked ([`Symbols::moved`]).

mod elf;
mod kallsyms;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Names by address.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    /// Sorted by address.
    sorted: Vec<(u64, String)>,
    by_name: HashMap<String, u64>,
    /// What the guest adds to linked addresses.
    slide: u64,
}

/// Bytes that hold no symbols.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no symbols in it: it is neither a System.map, nor a vmlinux with symbols, nor a kernel image \
     with kallsyms"
)]
pub struct NoSymbols;

/// Why there are no symbols.
#[derive(Debug, thiserror::Error)]
pub enum SymbolsError {
    /// The file can't be read.
    #[error("reading symbols from {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// How it failed.
        source: std::io::Error,
    },
    /// It is a kernel that can't be unpacked.
    #[error("unpacking {} for its symbols", path.display())]
    Unpack {
        /// Which.
        path: PathBuf,
        /// How it failed.
        source: vmm::BootError,
    },
    /// It holds none.
    #[error("symbols from {}: {source}", path.display())]
    None {
        /// Which.
        path: PathBuf,
        /// Why.
        source: NoSymbols,
    },
}

impl Symbols {
    /// From a file: a `System.map`, a `vmlinux`, or a kernel as it is booted.
    pub fn load(path: &Path) -> Result<Self, SymbolsError> {
        let read = |source| SymbolsError::Read {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::read(path).map_err(read)?;
        let bytes = if is_packed(&bytes) {
            vmm::unpacked_kernel(path).map_err(|source| SymbolsError::Unpack {
                path: path.to_owned(),
                source,
            })?
        } else {
            bytes
        };
        Self::parse(&bytes).map_err(|source| SymbolsError::None {
            path: path.to_owned(),
            source,
        })
    }

    /// From the bytes of a `System.map`, a `vmlinux`, or an unpacked kernel image.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoSymbols> {
        let found = if bytes.starts_with(b"\x7fELF") {
            let table = elf::symbols(bytes).filter(|table| !table.is_empty());
            table.or_else(|| kallsyms::symbols(bytes))
        } else {
            std::str::from_utf8(bytes).ok().and_then(system_map)
        };
        found
            .filter(|table| !table.is_empty())
            .map(Self::new)
            .ok_or(NoSymbols)
    }

    fn new(mut sorted: Vec<(u64, String)>) -> Self {
        sorted.sort();
        sorted.dedup();
        let by_name = sorted.iter().map(|(at, name)| (name.clone(), *at));
        Self {
            by_name: by_name.collect(),
            sorted,
            slide: 0,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// The same for a kernel whose page fault handler lies at `handler` now.
    #[must_use]
    pub fn moved(mut self, handler: u64) -> Self {
        let names = ["asm_exc_page_fault", "page_fault"];
        let linked = names.iter().find_map(|name| self.by_name.get(*name));
        if let Some(linked) = linked {
            let slide = handler.wrapping_sub(*linked);
            // Kernels move by multiples of 2 MiB (CONFIG_PHYSICAL_ALIGN), upwards and within 1 GiB.
            if slide.is_multiple_of(1 << 21) && slide < 1 << 30 {
                self.slide = slide;
            }
        }
        self
    }

    /// Where a symbol lies in the guest.
    pub fn address(&self, name: &str) -> Option<u64> {
        let linked = self.by_name.get(name)?;
        // What lies below the kernel's image (per-CPU offsets) does not move.
        Some(if *linked >= KERNEL {
            linked.wrapping_add(self.slide)
        } else {
            *linked
        })
    }

    /// The symbol that holds an address, and how far into it that is.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        let linked = address.wrapping_sub(self.slide);
        let behind = self.sorted.partition_point(|(at, _)| *at <= linked);
        let (at, name) = self.sorted.get(behind.checked_sub(1)?)?;
        let offset = linked - at;
        (*at >= KERNEL && offset < FURTHEST).then_some((name, offset))
    }
}

/// Where kernels are linked (`Documentation/arch/x86/x86_64/mm.rst`).
const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// No function or table is larger.
const FURTHEST: u64 = 16 << 20;

/// Whether it is a bzImage: the setup header's magic number (`Documentation/arch/x86/boot.rst`).
fn is_packed(bytes: &[u8]) -> bool {
    bytes.get(0x202..0x206) == Some(b"HdrS")
}

fn system_map(text: &str) -> Option<Vec<(u64, String)>> {
    text.lines()
        .filter(|line| !line.is_empty())
        .map(|line| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let _kind = words.next()?;
            Some((address, words.next()?.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "0000000000000000 D per_cpu_start\n\
        ffffffff81000000 T _text\n\
        ffffffff81000100 T asm_exc_page_fault\n\
        ffffffff82000000 R linux_banner\n";

    #[test]
    fn names_and_addresses() {
        let symbols = Symbols::parse(MAP.as_bytes()).unwrap();
        assert_eq!(symbols.len(), 4);
        assert_eq!(symbols.address("linux_banner"), Some(0xffff_ffff_8200_0000));
        assert_eq!(symbols.address("no_such"), None);
        assert_eq!(
            symbols.find(0xffff_ffff_8100_0110),
            Some(("asm_exc_page_fault", 0x10))
        );
        assert_eq!(symbols.find(0x1000), None, "per-CPU offsets hold nothing");
        assert_eq!(
            symbols.find(0xffff_ffff_ffff_0000),
            None,
            "too far behind the last"
        );
    }

    #[test]
    fn a_kernel_that_moved_is_found_by_its_handler() {
        let symbols = Symbols::parse(MAP.as_bytes()).unwrap();
        let moved = symbols.clone().moved(0xffff_ffff_9a00_0100);
        assert_eq!(moved.address("linux_banner"), Some(0xffff_ffff_9b00_0000));
        assert_eq!(moved.address("per_cpu_start"), Some(0));
        assert_eq!(moved.find(0xffff_ffff_9b00_0004), Some(("linux_banner", 4)));
        let odd = symbols.moved(0xffff_ffff_8100_0200);
        assert_eq!(
            odd.address("_text"),
            Some(0xffff_ffff_8100_0000),
            "another kernel's"
        );
    }

    #[test]
    fn what_is_no_table_is_refused() {
        for bytes in [&b""[..], b"hello world\n", b"\x7fELF", &[0xff; 64]] {
            assert_eq!(Symbols::parse(bytes).unwrap_err(), NoSymbols);
        }
    }
}
