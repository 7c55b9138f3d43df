//! The walker against the model, on a machine made of arbitrary bytes. The body of a fuzz target,
//! and of an ordinary test with a bounded number of seeds.

use std::collections::BTreeSet;

use addr::{Gpa, Gva, Hva};
use mmu::walker::{
    AccessedDirty, GuestPhysical, PteFault, PteUpdate, PteWidth, Step, WalkFault, walk,
};
use mmu::{
    Access, AccessKind, Fault, GigabytePages, PagingFeatures, PagingRegisters, Privilege, Regime,
    Vendor,
};

use super::{Cpuid, Model, Slot};

const RAM: u64 = 16 * 4096;

/// Takes numbers from the front of the input; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (front, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..front.len()].copy_from_slice(front);
        self.0 = rest;
        bytes
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn access(&mut self) -> Access {
        let byte = self.byte();
        let kinds = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
        let privileges = [
            Privilege::User,
            Privilege::Supervisor,
            Privilege::SupervisorAcSet,
            Privilege::Implicit,
        ];
        Access::new(
            kinds[usize::from(byte) % 3],
            privileges[usize::from(byte >> 4) % 4],
        )
    }

    fn registers(&mut self) -> PagingRegisters {
        let (flags, mode) = (u64::from(self.byte()), self.byte());
        // PE and PG, WP.
        let mut cr0 = 0x8000_0001 | (flags & 1) << 16;
        // PSE, PGE; SMEP, SMAP, PKE.
        let mut cr4 = (flags >> 1 & 1) << 4 | (flags >> 2 & 1) << 7 | (flags >> 3 & 7) << 20;
        let mut efer = (flags >> 6 & 1) << 11;
        match mode % 5 {
            0 => cr0 &= !0x8000_0000,
            1 => {}
            2 => cr4 |= 0x20,
            _ => {
                cr4 |= 0x20 | u64::from(mode & 0x80) << 5;
                efer |= 0x500;
            }
        }
        PagingRegisters {
            cr0,
            cr3: self.word() & 0xf_ffff,
            cr4,
            efer,
            pdptrs: [(); 4].map(|()| self.word() & 0xf_ffff),
            pkru: self.word() as u32,
        }
    }

    fn cpuid(&mut self) -> Cpuid {
        let byte = self.byte();
        Cpuid {
            max_phys_bits: 32 + u32::from(byte) % 21,
            gigabyte_pages: byte & 0x40 == 0,
            amd: byte & 0x80 != 0,
        }
    }
}

/// Memory for the walker: the model's, kept apart.
struct Memory {
    model: Model,
}

impl Memory {
    fn place(&self, gpa: Gpa) -> Option<(usize, Slot)> {
        let slot = *self.model.slot_at(gpa.raw())?;
        Some(((slot.offset + gpa.raw() - slot.gpa) as usize, slot))
    }

    fn bytes(width: PteWidth) -> usize {
        match width {
            PteWidth::Four => 4,
            PteWidth::Eight => 8,
        }
    }
}

impl GuestPhysical for Memory {
    fn read_pte(&mut self, gpa: Gpa, width: PteWidth) -> Result<u64, PteFault> {
        let len = Self::bytes(width) as u64;
        assert_eq!(gpa.raw() % len, 0, "entries are aligned");
        let (offset, _) = self.place(gpa).ok_or(PteFault::NotMemory)?;
        Ok(self.model.read(offset as u64, len as usize))
    }

    fn cmpxchg_pte(
        &mut self,
        gpa: Gpa,
        width: PteWidth,
        current: u64,
        new: u64,
    ) -> Result<PteUpdate, PteFault> {
        let now = self.read_pte(gpa, width)?;
        let (_, slot) = self.place(gpa).ok_or(PteFault::NotMemory)?;
        if slot.readonly {
            return Ok(PteUpdate::ReadOnly);
        }
        if now != current {
            return Ok(PteUpdate::Changed);
        }
        assert_eq!((now ^ new) & !0x60, 0, "only A and D");
        self.model.store(gpa.raw(), new, Self::bytes(width));
        Ok(PteUpdate::Done)
    }
}

/// Some accesses on a machine that the input describes.
pub fn walker(data: &[u8]) {
    let mut input = Input(data);
    let cpuid = input.cpuid();
    let registers = input.registers();
    let slot = |number, gpa, readonly| Slot {
        number,
        gpa,
        bytes: RAM,
        offset: 0,
        readonly,
        logged: false,
    };
    let mut model = Model {
        ram: vec![0; RAM as usize],
        slots: vec![slot(0, 0, false), slot(1, 0x8_0000, true)],
        registers,
        cpuid,
        dirty: BTreeSet::new(),
    };
    for _ in 0..input.byte() {
        let at = input.word() % (RAM / 8) * 8;
        let value = input.word();
        model.store(at, value, 8);
    }
    for _ in 0..8 {
        let gva = input.word();
        let access = input.access();
        one(&mut model, gva, access);
    }
}

fn one(model: &mut Model, gva: u64, access: Access) {
    let features = PagingFeatures {
        max_phys_bits: model.cpuid.max_phys_bits as u8,
        gigabyte_pages: if model.cpuid.gigabyte_pages {
            GigabytePages::Supported
        } else {
            GigabytePages::Reserved
        },
        vendor: if model.cpuid.amd {
            Vendor::Amd
        } else {
            Vendor::Intel
        },
    };
    let regime = Regime::new(&model.registers, features);
    let mut memory = Memory {
        model: model.clone(),
    };
    let mut seen = 0;
    let mut count = |_: Step| seen += 1;
    let gva_typed = Gva::new(gva);
    let look = AccessedDirty::Leave;
    let looked = walk(&mut memory, &regime, gva_typed, access, look, &mut count);
    assert!(memory.model.ram == model.ram, "a look changes nothing");
    assert!(seen <= 5, "{seen} entries");
    let got = walk(
        &mut memory,
        &regime,
        gva_typed,
        access,
        AccessedDirty::Set,
        &mut (),
    );
    let expected = model.translate(gva, access, Hva::new(0));
    match (got, expected) {
        (Ok(page), Ok(answer)) => {
            assert_eq!(page.gpa.raw(), answer.gpa);
            assert_eq!(page.size.bytes(), answer.guest_page);
            assert_eq!((page.global, page.pkey), (answer.global, answer.pkey));
        }
        (Ok(page), Err(Fault::Mmio { gpa } | Fault::ReadOnly { gpa, .. })) => {
            assert_eq!(page.gpa, gpa);
        }
        (Err(WalkFault::Page(fault)), Err(Fault::Page(expected))) => {
            assert_eq!(fault, expected);
            assert_eq!(looked, got);
        }
        (got, expected) => panic!("{got:x?}, expected {expected:x?}"),
    }
    assert!(memory.model.ram == model.ram, "the same bits set");
}
