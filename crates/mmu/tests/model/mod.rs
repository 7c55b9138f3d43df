//! Translation as the manuals tell it, slowly and without cleverness.
//!
//! Nothing here comes from the crate under test but the types of its interface. Memory is a vector,
//! slots are a list that is searched from the front, a table entry is a vector of bits, and each
//! rule is one line.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unreachable_pub, reason = "shared by test files")]

pub mod bytes;
pub mod ops;

use std::collections::BTreeSet;

use addr::{Gpa, Gva, Hva};
use mmu::{Access, AccessKind, Fault, PageFault, PagingRegisters, Privilege};
use x86::page_fault::PageFaultCode;

/// One memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub number: u32,
    pub gpa: u64,
    pub bytes: u64,
    /// Where it lies in RAM.
    pub offset: u64,
    pub readonly: bool,
    pub logged: bool,
}

/// What CPUID says.
#[derive(Clone, Copy, Debug)]
pub struct Cpuid {
    pub max_phys_bits: u32,
    pub gigabyte_pages: bool,
    pub amd: bool,
}

/// The whole machine.
#[derive(Clone)]
pub struct Model {
    pub ram: Vec<u8>,
    pub slots: Vec<Slot>,
    pub registers: PagingRegisters,
    pub cpuid: Cpuid,
    /// Pages that the log knows: slot number, page of the slot.
    pub dirty: BTreeSet<(u32, u64)>,
}

/// What the model says of one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub gpa: u64,
    pub offset: u64,
    /// Bytes of the guest's page.
    pub guest_page: u64,
    pub user: bool,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
    pub global: bool,
    pub pkey: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Off,
    Bits32,
    Pae,
    Long(u32),
}

/// An entry, bit by bit.
#[derive(Clone, Copy)]
struct Pte {
    value: u64,
    level: u32,
    gpa: u64,
}

impl Pte {
    fn bit(self, n: u32) -> bool {
        self.value >> n & 1 == 1
    }

    fn any(self, low: u32, high: u32) -> bool {
        (low..=high).any(|n| self.bit(n))
    }

    /// Bits `low` to `high` at their place.
    fn field(self, low: u32, high: u32) -> u64 {
        (low..=high).filter(|n| self.bit(*n)).map(|n| 1 << n).sum()
    }
}

struct Page {
    gpa: u64,
    bytes: u64,
    user: bool,
    write: bool,
    execute: bool,
    global: bool,
    dirty: bool,
    pkey: u8,
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

impl Model {
    fn mode(&self) -> Mode {
        let r = &self.registers;
        if !bit(r.cr0, 31) {
            Mode::Off
        } else if !bit(r.cr4, 5) {
            Mode::Bits32
        } else if !bit(r.efer, 8) {
            Mode::Pae
        } else if bit(r.cr4, 12) {
            Mode::Long(5)
        } else {
            Mode::Long(4)
        }
    }

    fn nx(&self) -> bool {
        bit(self.registers.efer, 11)
    }

    pub fn slot_at(&self, gpa: u64) -> Option<&Slot> {
        self.slots
            .iter()
            .find(|s| gpa >= s.gpa && gpa - s.gpa < s.bytes)
    }

    pub fn read(&self, offset: u64, bytes: usize) -> u64 {
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.ram[offset as usize..offset as usize + bytes]);
        u64::from_le_bytes(value)
    }

    /// A store of the guest's to a physical address, 4 or 8 bytes; ignored outside of RAM.
    pub fn store(&mut self, gpa: u64, value: u64, bytes: usize) {
        let Some(slot) = self.slot_at(gpa).copied() else {
            return;
        };
        if slot.readonly {
            return;
        }
        let offset = (slot.offset + gpa - slot.gpa) as usize;
        self.ram[offset..offset + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        self.mark(&slot, gpa);
    }

    fn mark(&mut self, slot: &Slot, gpa: u64) {
        if slot.logged {
            self.dirty.insert((slot.number, (gpa - slot.gpa) / 4096));
        }
    }

    /// Translates, sets A and D, marks the dirty log.
    pub fn translate(&mut self, gva: u64, access: Access, ram: Hva) -> Result<Answer, Fault> {
        let page = self.walk(gva, access)?;
        let write = access.kind == AccessKind::Write;
        let gpa = Gpa::new(page.gpa);
        let slot = *self.slot_at(page.gpa).ok_or(Fault::Mmio { gpa })?;
        let offset = slot.offset + page.gpa - slot.gpa;
        if write && slot.readonly {
            let hva = Hva::new(ram.raw() + offset);
            return Err(Fault::ReadOnly { gpa, hva });
        }
        if write {
            self.mark(&slot, page.gpa);
        }
        let number = (slot.number, (page.gpa - slot.gpa) / 4096);
        let logged = !slot.logged || self.dirty.contains(&number);
        let may = |kind| self.allowed(&page, Access { kind, ..access }).is_ok();
        Ok(Answer {
            gpa: page.gpa,
            offset,
            guest_page: page.bytes,
            user: page.user,
            readable: may(AccessKind::Read),
            writable: may(AccessKind::Write) && page.dirty && !slot.readonly && logged,
            executable: may(AccessKind::Execute),
            global: page.global,
            pkey: page.pkey,
        })
    }

    fn walk(&mut self, gva: u64, access: Access) -> Result<Page, Fault> {
        let fault = |model: &Self, mut code: PageFaultCode| {
            if access.kind == AccessKind::Write {
                code |= PageFaultCode::WRITE;
            }
            if access.privilege == Privilege::User {
                code |= PageFaultCode::USER;
            }
            let r = &model.registers;
            let told = bit(r.cr4, 20) || (bit(r.cr4, 5) && model.nx());
            if access.kind == AccessKind::Execute && told {
                code |= PageFaultCode::FETCH;
            }
            let gva = Gva::new(gva);
            Fault::Page(PageFault {
                gva,
                error_code: code,
            })
        };
        let mode = self.mode();
        let (entries, last) = match self.entries(mode, gva) {
            Ok(entries) => entries,
            Err(code) => return Err(fault(self, code)),
        };
        let page = self.page(mode, gva, &entries, last);
        self.allowed(&page, access)
            .map_err(|code| fault(self, code))?;
        self.set_bits(mode, &entries, access);
        let write = access.kind == AccessKind::Write;
        Ok(Page {
            dirty: page.dirty || write,
            ..page
        })
    }

    /// The entries in memory that take part, top first, and the last of them.
    fn entries(&self, mode: Mode, gva: u64) -> Result<(Vec<Pte>, Option<Pte>), PageFaultCode> {
        let cr3 = self.registers.cr3;
        let (mut level, mut table, size, index_bits) = match mode {
            Mode::Off => return Ok((vec![], None)),
            Mode::Bits32 => (2, cr3 & 0xffff_f000, 4, 10),
            Mode::Pae => {
                let pdpte = self.registers.pdptrs[(gva >> 30 & 3) as usize];
                if !bit(pdpte, 0) {
                    return Err(PageFaultCode::empty());
                }
                (2, pdpte & 0x000f_ffff_ffff_f000, 8, 9)
            }
            Mode::Long(levels) => {
                let above = !0 << self.cpuid.max_phys_bits;
                (levels, cr3 & 0x000f_ffff_ffff_f000 & !above, 8, 9)
            }
        };
        let mut entries = vec![];
        loop {
            let index = gva >> (12 + (level - 1) * index_bits) & ((1 << index_bits) - 1);
            let gpa = table + index * size;
            let slot = self.slot_at(gpa).ok_or(PageFaultCode::empty())?;
            let value = self.read(slot.offset + gpa - slot.gpa, size as usize);
            let pte = Pte { value, level, gpa };
            if !pte.bit(0) {
                return Err(PageFaultCode::empty());
            }
            if self.reserved(mode, pte) {
                return Err(PageFaultCode::PRESENT | PageFaultCode::RESERVED);
            }
            entries.push(pte);
            if self.maps_page(mode, pte) {
                return Ok((entries, Some(pte)));
            }
            table = match mode {
                Mode::Bits32 => pte.field(12, 31),
                _ => pte.field(12, 51),
            };
            level -= 1;
        }
    }

    fn maps_page(&self, mode: Mode, pte: Pte) -> bool {
        match (mode, pte.level) {
            (_, 1) => true,
            (Mode::Bits32, 2) => pte.bit(7) && bit(self.registers.cr4, 4),
            (_, 2) => pte.bit(7),
            (Mode::Long(_), 3) => pte.bit(7) && self.cpuid.gigabyte_pages,
            _ => false,
        }
    }

    fn reserved(&self, mode: Mode, pte: Pte) -> bool {
        let m = self.cpuid.max_phys_bits;
        let page = self.maps_page(mode, pte);
        match mode {
            Mode::Off => false,
            Mode::Bits32 => {
                let m = m.min(40);
                page && pte.level == 2 && pte.any(m - 20 + 1, 21)
            }
            Mode::Pae => {
                (pte.bit(63) && !self.nx())
                    || pte.any(m, 62)
                    || (page && pte.level == 2 && pte.any(13, 20))
            }
            Mode::Long(_) => {
                (pte.bit(63) && !self.nx())
                    || (m < 52 && pte.any(m, 51))
                    || (page && pte.level == 2 && pte.any(13, 20))
                    || (page && pte.level == 3 && pte.any(13, 29))
                    || (pte.level == 3 && pte.bit(7) && !self.cpuid.gigabyte_pages)
                    || (pte.level >= 4 && pte.bit(7))
                    || (pte.level >= 4 && pte.bit(8) && self.cpuid.amd)
            }
        }
    }

    fn page(&self, mode: Mode, gva: u64, entries: &[Pte], last: Option<Pte>) -> Page {
        let Some(last) = last else {
            return Page {
                gpa: gva & 0xffff_ffff,
                bytes: 1 << 30,
                user: true,
                write: true,
                execute: true,
                global: false,
                dirty: true,
                pkey: 0,
            };
        };
        let (frame, bytes) = match (mode, last.level) {
            (Mode::Bits32, 1) => (last.field(12, 31), 4096),
            (Mode::Bits32, _) => (last.field(22, 31) | last.field(13, 20) << 19, 4 << 20),
            (_, 1) => (last.field(12, 51), 4096),
            (_, 2) => (last.field(21, 51), 2 << 20),
            _ => (last.field(30, 51), 1 << 30),
        };
        let keys = matches!(mode, Mode::Long(_)) && bit(self.registers.cr4, 22);
        Page {
            gpa: frame + gva % bytes,
            bytes,
            user: entries.iter().all(|e| e.bit(2)),
            write: entries.iter().all(|e| e.bit(1)),
            execute: entries.iter().all(|e| !e.bit(63)),
            global: last.bit(8) && bit(self.registers.cr4, 7),
            dirty: last.bit(6),
            pkey: if keys {
                (last.field(59, 62) >> 59) as u8
            } else {
                0
            },
        }
    }

    fn allowed(&self, page: &Page, access: Access) -> Result<(), PageFaultCode> {
        let r = &self.registers;
        if self.mode() == Mode::Off {
            return Ok(());
        }
        let user = access.privilege == Privilege::User;
        let write = access.kind == AccessKind::Write;
        let fetch = access.kind == AccessKind::Execute;
        let wp = bit(r.cr0, 16);
        let mut forbidden = false;
        if user && !page.user {
            forbidden = true;
        }
        if write && !page.write && (user || wp) {
            forbidden = true;
        }
        if fetch && !page.execute {
            forbidden = true;
        }
        if fetch && !user && page.user && bit(r.cr4, 20) {
            forbidden = true;
        }
        let smap_applies = access.privilege != Privilege::SupervisorAcSet;
        if !fetch && !user && page.user && bit(r.cr4, 21) && smap_applies {
            forbidden = true;
        }
        let mut key = false;
        if matches!(self.mode(), Mode::Long(_)) && bit(r.cr4, 22) && page.user && !fetch {
            let disable_access = bit(r.pkru.into(), 2 * u32::from(page.pkey));
            let disable_write = bit(r.pkru.into(), 2 * u32::from(page.pkey) + 1);
            key = disable_access || (disable_write && write && (user || wp));
        }
        let mut code = PageFaultCode::PRESENT;
        if key {
            code |= PageFaultCode::PROTECTION_KEY;
        }
        if forbidden || key { Err(code) } else { Ok(()) }
    }

    /// A in all entries, D in the last for a write.
    fn set_bits(&mut self, mode: Mode, entries: &[Pte], access: Access) {
        let bytes = if mode == Mode::Bits32 { 4 } else { 8 };
        for (index, pte) in entries.iter().enumerate() {
            let last = index + 1 == entries.len();
            // The same entry may take part twice: read it anew.
            let slot = *self.slot_at(pte.gpa).expect("it was read from there");
            let now = self.read(slot.offset + pte.gpa - slot.gpa, bytes);
            let mut set = now | 0x20;
            if last && access.kind == AccessKind::Write {
                set |= 0x40;
            }
            if set != now {
                self.store(pte.gpa, set, bytes);
            }
        }
    }
}
