//! Random operations on a machine, drawn so that they often meet: few tables, few indices, few
//! slots.

use addr::Gpa;
use fastrand::Rng;
use memory::slot::SlotFlags;
use mmu::{Access, AccessKind, PagingRegisters, Privilege};

/// Draws what a guest may do.
#[derive(Clone)]
pub struct Random(Rng);

/// How often the guest changes its tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temper {
    /// At every sixth step.
    Busy,
    /// At every hundredth: what is cached is used.
    Calm,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(Rng::with_seed(seed))
    }

    pub fn next(&mut self) -> u64 {
        self.0.u64(..)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0.u64(..n)
    }

    /// Once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.usize(..from.len())]
    }
}

pub const MIB: u64 = 1 << 20;
/// RAM of the machine.
pub const RAM: u64 = 6 * MIB;
/// Frames that hold tables.
pub const TABLES: u64 = 12;
/// Bytes from the start of RAM that tables lie in.
pub const TABLE_BYTES: u64 = 16 * 4096;

/// Indices that are used in tables of 512 entries, and of 1024.
const INDICES: [u64; 4] = [0, 1, 256, 511];
const INDICES_32: [u64; 5] = [0, 1, 2, 513, 1023];

/// One step.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// The guest changes a table, then flushes all.
    Store { gpa: u64, value: u64, bytes: usize },
    /// The guest changes a table, invalidates one page, and touches it.
    StoreOne {
        gpa: u64,
        value: u64,
        bytes: usize,
        gva: u64,
        access: Access,
    },
    /// The guest touches memory.
    Translate { gva: u64, access: Access },
    /// The guest touches one place twice.
    Twice {
        gva: u64,
        first: Access,
        second: Access,
    },
    /// The guest writes registers.
    Registers(PagingRegisters),
    /// The monitor changes a slot.
    Region {
        number: u32,
        gpa: Gpa,
        bytes: u64,
        offset: u64,
        flags: SlotFlags,
    },
    /// The monitor harvests the dirty log.
    Harvest(u32),
}

impl Random {
    /// How an entry may look: mostly one that leads somewhere.
    fn entry(&mut self, bits32: bool) -> u64 {
        let tidy = !self.once_in(16);
        let rarely = if tidy { 32 } else { 3 };
        let mut value = 0b111
            | if tidy && !self.once_in(12) {
                (1 + self.below(TABLES)) << 12
            } else {
                self.target(bits32)
            };
        for n in 0..3 {
            if self.once_in(rarely) {
                value &= !(1 << n);
            }
        }
        for (n, set) in [(5, 2), (6, 3), (7, rarely), (8, rarely), (63, rarely)] {
            if self.once_in(set) {
                value |= 1 << n;
            }
        }
        if self.once_in(if tidy { 8 } else { 2 }) {
            value |= self.below(16) << 59;
        }
        if !tidy && self.once_in(2) {
            value |= 1 << self.below(64);
        }
        value
    }

    fn target(&mut self, bits32: bool) -> u64 {
        let frame = match self.below(32) {
            0..=15 => 1 + self.below(TABLES),
            16..=18 => 1023,                     // the end of slot 0
            19 => 1024,                          // behind it
            20..=22 => 0x4_0000 + self.below(4), // slot 1, at 1 GiB
            23..=26 => self.pick(&[0, 0x200, 0x4_0000, 0x8_0000]), // bases of large pages
            27..=30 => 0x8_0000 + 1 + self.below(TABLES), // slot 2: tables again, often read-only
            _ => self.next() & 0xff_ffff_ffff,
        };
        if bits32 {
            (frame << 12) & 0xffff_ffff
        } else {
            frame << 12
        }
    }

    pub fn store(&mut self, bits32: bool) -> (u64, u64, usize) {
        let frame = 1 + self.below(TABLES);
        let value = self.entry(bits32);
        if bits32 {
            let gpa = frame * 4096 + self.pick(&INDICES_32) * 4;
            (gpa, value & 0xffff_ffff, 4)
        } else {
            (frame * 4096 + self.pick(&INDICES) * 8, value, 8)
        }
    }

    /// Entries for all indices of all tables.
    pub fn fill(&mut self) -> Vec<(u64, u64, usize)> {
        let mut stores = Vec::new();
        for frame in 1..=TABLES {
            for index in INDICES {
                stores.push((frame * 4096 + index * 8, self.entry(false), 8));
            }
        }
        stores
    }

    pub fn gva(&mut self, bits32: bool) -> u64 {
        let offset = self.pick(&[0, 8, 0x123, 0xfff]);
        if bits32 {
            self.pick(&INDICES_32) << 22 | self.pick(&INDICES_32) << 12 | offset
        } else {
            let mut gva = offset;
            for shift in [12, 21, 30, 39, 48] {
                gva |= self.pick(&INDICES) << shift;
            }
            match self.below(8) {
                0 => gva, // mostly not canonical
                1 => gva & 0xffff_ffff,
                2 => gva | !0 << 47,
                _ => gva & ((1 << 47) - 1),
            }
        }
    }

    pub fn access(&mut self) -> Access {
        let kind = self.pick(&[AccessKind::Read, AccessKind::Write, AccessKind::Execute]);
        let privilege = self.pick(&[
            Privilege::User,
            Privilege::Supervisor,
            Privilege::SupervisorAcSet,
            Privilege::Implicit,
        ]);
        Access { kind, privilege }
    }

    pub fn registers(&mut self) -> PagingRegisters {
        let mut cr0 = 1 | 1 << 31 | self.below(2) << 16;
        let mut cr4 = self.below(2) << 4
            | self.below(2) << 7
            | self.below(2) << 20
            | self.below(2) << 21
            | self.below(2) << 22;
        let mut efer = self.below(2) << 11;
        match self.below(12) {
            0 => cr0 &= !(1 << 31),
            1 | 2 => {}
            3 | 4 => cr4 |= 1 << 5,
            5 | 6 => {
                cr4 |= 1 << 5 | 1 << 12;
                efer |= 0x500;
            }
            _ => {
                cr4 |= 1 << 5;
                efer |= 0x500;
            }
        }
        let pdptrs = [0; 4].map(|_: u64| match self.below(8) {
            0 => 0,
            _ => (1 + self.below(TABLES)) << 12 | 1,
        });
        PagingRegisters {
            cr0,
            cr3: (1 + self.below(TABLES)) << 12 | self.pick(&[0, 0x18, 0x7ff]),
            cr4,
            efer,
            pdptrs,
            pkru: self.next() as u32 & self.next() as u32,
        }
    }

    fn region(&mut self) -> Op {
        let log = self.pick(&[SlotFlags::empty(), SlotFlags::LOG_DIRTY_PAGES]);
        let (number, gpa, bytes, offset, flags) = match self.below(8) {
            0 | 1 => (0, 0, 4 * MIB, 0, log),
            2 => (1, 0x4000_0000, 0, MIB, log),
            3 => (1, 0x4000_0000, 2 * MIB, MIB, log),
            4 => (1, 0x4020_0000, 2 * MIB, MIB, log),
            5 => (2, 0x8000_0000, self.pick(&[0, MIB]), 0, log),
            6 => (2, 0x8000_0000, MIB, 0, SlotFlags::READONLY | log),
            _ => (
                3,
                self.pick(&[0x4000_0000, 0x40_0000]),
                4096 * 3,
                5 * MIB,
                log,
            ),
        };
        Op::Region {
            number,
            gpa: Gpa::new(gpa),
            bytes,
            offset,
            flags,
        }
    }

    pub fn op(&mut self, bits32: bool, temper: Temper) -> Op {
        let calm = temper == Temper::Calm && !self.once_in(16);
        match self.below(64) {
            0..48 if calm => Op::Twice {
                gva: self.gva(bits32),
                first: self.access(),
                second: self.access(),
            },
            _ if calm => Op::Translate {
                gva: self.gva(bits32),
                access: self.access(),
            },
            0 => Op::Registers(self.registers()),
            1 if self.once_in(4) => self.region(),
            2 if self.once_in(4) => Op::Harvest(self.below(4) as u32),
            3..=6 => {
                let (gpa, value, bytes) = self.store(bits32);
                Op::Store { gpa, value, bytes }
            }
            7..=12 => {
                let (gpa, value, bytes) = self.store(bits32);
                Op::StoreOne {
                    gpa,
                    value,
                    bytes,
                    gva: self.gva(bits32),
                    access: self.access(),
                }
            }
            _ => Op::Translate {
                gva: self.gva(bits32),
                access: self.access(),
            },
        }
    }
}
