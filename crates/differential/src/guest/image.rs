//! The guest's physical memory: page tables, descriptor tables, and handlers that halt.
//!
//! The kernel's part lies in the upper half of the address space, as Linux's does, so that user
//! code finds nothing in the lower half that isn't there natively. Every vector of the IDT leads to a
//! `HLT` of its own at CPL 0, and the processor's delivery of the exception leaves on the stack what
//! the oracle has from its signal context: RIP, RFLAGS, the error code.

use addr::{Gpa, Gva};

use crate::layout::{CODE, CODE_BYTES, DATA_BYTES, PAGE, WINDOWS, WRITABLE_BYTES};
use crate::local;

/// Bytes of guest RAM.
pub const RAM_BYTES: usize = 2 << 20;
/// Where RAM appears to the guest's kernel.
pub const KERNEL: Gva = Gva::new(0xffff_8000_0000_0000);

/// The root of the page tables.
pub const PML4: Gpa = Gpa::new(0x1000);
const TABLES_END: u64 = 0x2_0000;
const GDT: Gpa = Gpa::new(0x2_0000);
const IDT: Gpa = Gpa::new(0x2_1000);
const TSS: Gpa = Gpa::new(0x2_2000);
const STUBS: Gpa = Gpa::new(0x2_3000);
/// The stack pointer at CPL 0.
const STACK: Gpa = Gpa::new(0x2_8000);
/// Where the code window lies.
pub const CODE_PAGES: Gpa = Gpa::new(0x3_0000);
/// Where the data lies.
pub const DATA_PAGES: Gpa = Gpa::new(0x4_0000);

/// Linux's GDT (`arch/x86/kernel/cpu/common.c`), so that selectors mean the same; the TSS follows.
pub const GDT_ENTRIES: [u64; 8] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0,
];
/// The limit of Linux's GDT.
pub const GDT_LIMIT: u16 = 16 * 8 - 1;
/// The selector of the LDT, and where it lies (`GDT_ENTRY_LDT`).
pub const LDT_SELECTOR: u16 = 0x50;
const LDT: Gpa = Gpa::new(0x2_0800);
/// The limit of the LDT.
pub const LDT_LIMIT: u32 = local::ENTRIES.len() as u32 * 8 - 1;
/// The limit of the IDT.
pub const IDT_LIMIT: u16 = 256 * 16 - 1;
/// The kernel's code and data selectors, and the TSS's.
pub const KERNEL_CS: u16 = 0x10;
/// The kernel's data selector.
pub const KERNEL_DS: u16 = 0x18;
/// The selector of the TSS.
pub const TSS_SELECTOR: u16 = 0x40;
/// The limit of the TSS; its I/O bitmap lies beyond.
pub const TSS_LIMIT: u32 = 0x67;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Accessed and dirty.
const USED: u64 = 0x60;
const NO_EXECUTE: u64 = 1 << 63;

/// Bytes between two handlers.
const STUB_BYTES: u64 = 16;
const HLT: u8 = 0xf4;

/// Guest memory being written.
pub struct Image {
    bytes: Vec<u8>,
    next_table: u64,
}

impl Image {
    /// Everything but the test's own code and data.
    pub fn new() -> Self {
        let mut image = Self {
            bytes: vec![0; RAM_BYTES],
            next_table: PML4.raw() + PAGE as u64,
        };
        image.map_kernel();
        image.map_windows();
        image.descriptor_tables();
        image
    }

    /// The bytes from guest physical address 0.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn map_kernel(&mut self) {
        for offset in (0..RAM_BYTES as u64).step_by(PAGE) {
            let at = Gva::new(KERNEL.raw() + offset);
            self.map(at, Gpa::new(offset), WRITE);
        }
    }

    fn map_windows(&mut self) {
        for offset in (0..CODE_BYTES).step_by(PAGE) {
            self.map(plus(CODE, offset), gpa_plus(CODE_PAGES, offset), USER);
        }
        for window in WINDOWS {
            for offset in (0..DATA_BYTES).step_by(PAGE) {
                let write = if offset < WRITABLE_BYTES { WRITE } else { 0 };
                let flags = USER | NO_EXECUTE | write;
                self.map(plus(window, offset), gpa_plus(DATA_PAGES, offset), flags);
            }
        }
    }

    fn map(&mut self, gva: Gva, gpa: Gpa, flags: u64) {
        let mut table = PML4.raw();
        for level in [39, 30, 21] {
            let entry = table + (gva.raw() >> level & 0x1ff) * 8;
            if self.word(entry) == 0 {
                let next = self.next_table;
                assert!(next < TABLES_END, "more page tables than there is room for");
                self.next_table += PAGE as u64;
                self.put(entry, next | PRESENT | WRITE | USER | USED);
            }
            table = self.word(entry) & 0x000f_ffff_ffff_f000;
        }
        let entry = table + (gva.raw() >> 12 & 0x1ff) * 8;
        self.put(entry, gpa.raw() | PRESENT | USED | flags);
    }

    fn descriptor_tables(&mut self) {
        for (index, entry) in GDT_ENTRIES.into_iter().enumerate() {
            self.put(GDT.raw() + 8 * index as u64, entry);
        }
        // What Linux keeps the processor's number in (`GDT_ENTRY_CPUNODE`): that of the first.
        self.put(GDT.raw() + 8 * 15, 0x0040_f500_0000_0000);
        for (index, entry) in local::ENTRIES.iter().enumerate() {
            self.put(LDT.raw() + 8 * index as u64, entry.descriptor());
        }
        self.put_system_descriptor(TSS_SELECTOR, tss_base(), TSS_LIMIT, 0x8b);
        self.put_system_descriptor(LDT_SELECTOR, ldt_base(), LDT_LIMIT, 0x82);
        self.put(TSS.raw() + 4, kernel_gva(STACK).raw());
        // The I/O bitmap begins beyond the limit: no ports.
        self.put(TSS.raw() + 0x60, 0x68 << 48);
        for vector in 0..256 {
            self.put_gate(vector);
        }
    }

    /// A TSS's descriptor, or an LDT's (SDM 3A, 9.2.3).
    fn put_system_descriptor(&mut self, selector: u16, base: Gva, limit: u32, kind: u64) {
        let base = base.raw();
        let at = GDT.raw() + u64::from(selector);
        let low =
            u64::from(limit) | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56;
        self.put(at, low);
        self.put(at + 8, base >> 32);
    }

    /// User code may call `INT3` and `INTO` alone.
    fn put_gate(&mut self, vector: u64) {
        let target = kernel_gva(STUBS).raw() + vector * STUB_BYTES;
        let privilege: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = target & 0xffff
            | u64::from(KERNEL_CS) << 16
            | 0x8e << 40
            | privilege << 45
            | (target >> 16 & 0xffff) << 48;
        let at = IDT.raw() + vector * 16;
        self.put(at, low);
        self.put(at + 8, target >> 32);
        self.bytes[(STUBS.raw() + vector * STUB_BYTES) as usize] = HLT;
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(word)
    }

    fn put(&mut self, at: u64, value: u64) {
        let at = at as usize;
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}

impl Default for Image {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the kernel sees a piece of RAM.
pub fn kernel_gva(gpa: Gpa) -> Gva {
    Gva::new(KERNEL.raw() + gpa.raw())
}

/// The guest physical address behind one of the kernel's.
pub fn kernel_gpa(gva: Gva) -> Option<Gpa> {
    let offset = gva.raw().checked_sub(KERNEL.raw())?;
    (offset < RAM_BYTES as u64).then_some(Gpa::new(offset))
}

/// GDTR's base.
pub fn gdt_base() -> Gva {
    kernel_gva(GDT)
}

/// IDTR's base.
pub fn idt_base() -> Gva {
    kernel_gva(IDT)
}

/// The base of the LDT.
pub fn ldt_base() -> Gva {
    kernel_gva(LDT)
}

/// The base of the TSS.
pub fn tss_base() -> Gva {
    kernel_gva(TSS)
}

/// Which vector's handler halted, from RIP behind its `HLT`.
pub fn halted_vector(rip: Gva) -> Option<u32> {
    let offset = rip.raw().checked_sub(kernel_gva(STUBS).raw() + 1)?;
    (offset % STUB_BYTES == 0 && offset < 256 * STUB_BYTES).then_some((offset / STUB_BYTES) as u32)
}

/// Whether the processor pushes an error code with this exception (SDM 3A, table 7-1).
pub fn has_error_code(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

fn plus(gva: Gva, offset: usize) -> Gva {
    Gva::new(gva.raw() + offset as u64)
}

fn gpa_plus(gpa: Gpa, offset: usize) -> Gpa {
    Gpa::new(gpa.raw() + offset as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_told_apart() {
        let stub = kernel_gva(STUBS).raw() + 14 * STUB_BYTES;
        assert_eq!(halted_vector(Gva::new(stub + 1)), Some(14));
        assert_eq!(halted_vector(Gva::new(stub + 2)), None);
        assert_eq!(halted_vector(Gva::new(0)), None);
    }

    #[test]
    fn the_windows_map_what_the_layout_says() {
        let image = Image::new();
        let leaf = |gva: u64| {
            let mut table = PML4.raw();
            for level in [39, 30, 21] {
                table = image.word(table + (gva >> level & 0x1ff) * 8) & 0xf_ffff_ffff_f000;
            }
            image.word(table + (gva >> 12 & 0x1ff) * 8)
        };
        assert_eq!(leaf(0x1000_1000), 0x3_1000 | PRESENT | USED | USER);
        let last = leaf(WINDOWS[1].raw() + 0x3000);
        assert_eq!(last, 0x4_3000 | PRESENT | USED | USER | NO_EXECUTE);
        assert_eq!(leaf(WINDOWS[0].raw() + 0x4000), 0);
    }
}
