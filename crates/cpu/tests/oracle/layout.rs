//! Where everything lies in a guest's memory, and what its tables hold.
//!
//! | address  | what                                                      |
//! |----------|-----------------------------------------------------------|
//! | 0x00000  | real-mode vectors: vector `n` leads to `HANDLERS + 16 n`  |
//! | 0x01000  | GDT                                                       |
//! | 0x02000  | IDT                                                       |
//! | 0x03000  | TSS with I/O bitmap; 0x3800 a second one                  |
//! | 0x04000  | LDT                                                       |
//! | 0x06000  | data                                                      |
//! | 0x07000  | code                                                      |
//! | 0x08000  | top of the stack                                          |
//! | 0x09000  | stack of level 0; 0xa000 of level 1; 0xb000 of IST 1      |
//! | 0x0c000  | page tables: PML4, PDPT, PD                               |
//! | 0x05000  | 32-bit page directory; its table at 0xf000                 |
//! | 0x20000  | handlers, each a `HLT`                                    |
//!
//! Everywhere else where a guest may lose its way there are `HLT`s.

use cpu::{CpuState, Segment, TableRegister};

/// Size of a guest's memory.
pub const MEMORY: usize = 0x4_0000;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const TSS2: u64 = 0x3800;
pub const LDT: u64 = 0x4000;
pub const DATA: u64 = 0x6000;
pub const CODE: u64 = 0x7000;
pub const STACK: u64 = 0x8000;
pub const STACK0: u64 = 0x9000;
pub const IST1: u64 = 0xb000;
pub const PML4: u64 = 0xc000;
pub const DIRECTORY32: u64 = 0x5000;
pub const HANDLERS: u64 = 0x2_0000;

pub const HLT: u8 = 0xf4;

/// Selectors.
pub mod sel {
    pub const CODE32: u16 = 0x08;
    pub const DATA32: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x1b;
    pub const USER_DATA32: u16 = 0x23;
    pub const CODE64: u16 = 0x28;
    pub const USER_CODE64: u16 = 0x33;
    pub const TSS: u16 = 0x38;
    pub const CONFORMING: u16 = 0x48;
    pub const LDT: u16 = 0x50;
    pub const CODE16: u16 = 0x60;
    pub const DATA16: u16 = 0x68;
    pub const GATE: u16 = 0x70;
    pub const TSS2: u16 = 0x80;
    pub const ABSENT_DATA: u16 = 0x90;
    pub const READ_ONLY: u16 = 0x98;
    pub const TASK_GATE: u16 = 0xa0;
    pub const EXECUTE_ONLY: u16 = 0xa8;
    pub const EXPAND_DOWN: u16 = 0xb0;
    pub const USER_CODE16: u16 = 0xbb;
    pub const USER_DATA16: u16 = 0xc3;
    pub const ABSENT_CODE: u16 = 0xc8;
    /// One that the table does not hold.
    pub const OUTSIDE: u16 = 0x200;
}

/// The modes that a guest can begin in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    User32,
    Paged32,
    Compatibility,
    UserCompatibility,
    Long,
    UserLong,
}

impl Start {
    pub const ALL: [Self; 10] = [
        Self::Real,
        Self::Virtual8086,
        Self::Protected16,
        Self::Protected32,
        Self::User32,
        Self::Paged32,
        Self::Compatibility,
        Self::UserCompatibility,
        Self::Long,
        Self::UserLong,
    ];

    pub fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Virtual8086 | Self::Protected16 => 16,
            Self::Long | Self::UserLong => 64,
            _ => 32,
        }
    }

    pub fn is_long(self) -> bool {
        matches!(
            self,
            Self::Compatibility | Self::UserCompatibility | Self::Long | Self::UserLong
        )
    }

    pub fn has_descriptors(self) -> bool {
        !matches!(self, Self::Real | Self::Virtual8086)
    }
}

fn put(memory: &mut [u8], at: u64, bytes: &[u8]) {
    memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
}

fn put64(memory: &mut [u8], at: u64, value: u64) {
    put(memory, at, &value.to_le_bytes());
}

/// The memory of every guest, without its code.
pub fn memory(start: Start) -> Vec<u8> {
    let mut memory = vec![0; MEMORY];
    for range in [0x7000..0x8800, 0x1_0000..MEMORY] {
        memory[range].fill(HLT);
    }
    real_vectors(&mut memory);
    descriptors(&mut memory, start);
    interrupt_gates(&mut memory, start);
    page_tables(&mut memory);
    task_states(&mut memory, start);
    memory
}

fn real_vectors(memory: &mut [u8]) {
    for vector in 0..256u64 {
        let handler = HANDLERS + 16 * vector;
        put(memory, handler, &[HLT]);
        let segment = ((HANDLERS >> 4) as u16).to_le_bytes();
        put(memory, vector * 4, &((16 * vector) as u16).to_le_bytes());
        put(memory, vector * 4 + 2, &segment);
    }
}

fn descriptors(memory: &mut [u8], start: Start) {
    let mut table = vec![
        (sel::CODE32, 0x00cf_9b00_0000_ffff),
        (sel::DATA32, 0x00cf_9300_0000_ffff),
        (sel::USER_CODE32, 0x00cf_fb00_0000_ffff),
        (sel::USER_DATA32, 0x00cf_f300_0000_ffff),
        (sel::CODE64, 0x00af_9b00_0000_ffff),
        (sel::USER_CODE64, 0x00af_fb00_0000_ffff),
        (sel::TSS, 0x0000_8b00_3000_0097),
        (sel::CONFORMING, 0x00cf_9f00_0000_ffff),
        (sel::LDT, 0x0000_8200_4000_00ff),
        (sel::CODE16, 0x0000_9b00_0000_ffff),
        (sel::DATA16, 0x0000_9300_0000_ffff),
        (sel::TSS2, 0x0000_8900_3800_0067),
        (sel::ABSENT_DATA, 0x00cf_7300_0000_ffff),
        (sel::READ_ONLY, 0x00cf_f100_0000_ffff),
        (sel::EXECUTE_ONLY, 0x00cf_f900_0000_ffff),
        (sel::EXPAND_DOWN, 0x00cf_f700_0000_0000),
        (sel::USER_CODE16, 0x0000_fb00_0000_ffff),
        (sel::USER_DATA16, 0x0000_f300_0000_ffff),
        (sel::ABSENT_CODE, 0x00cf_7b00_0000_ffff),
    ];
    let handler = HANDLERS + 0xfe0;
    if start.is_long() {
        table.push((sel::GATE, 0x0002_ec00_0028_0000 | handler & 0xffff));
    } else {
        table.push((sel::GATE, 0x0002_ec02_0008_0000 | handler & 0xffff));
        table.push((sel::TASK_GATE, 0x0000_e500_0080_0000));
    }
    for (selector, raw) in table {
        put64(memory, GDT + u64::from(selector & !7), raw);
    }
    put64(memory, LDT + 8, 0x00cf_f300_0000_ffff);
}

/// Vectors 3, 4 and from 0x80 on may be raised by user code. 0x82 is a 16-bit gate, 0x83 a trap
/// gate, 0x84 absent, 0x85 a task gate, 0x86 conforming, 0x87 a data segment; in long mode 8 and
/// 0x88 have a stack of their own.
fn interrupt_gates(memory: &mut [u8], start: Start) {
    for vector in 0..256u64 {
        let handler = HANDLERS + 16 * vector;
        let dpl = if matches!(vector, 3 | 4 | 0x80..) {
            3
        } else {
            0
        };
        let kind = match vector {
            0x82 if !start.is_long() => 6,
            0x83 => 15,
            0x85 if !start.is_long() => 5,
            0x89 => 2,
            _ => 14,
        };
        let present = u64::from(vector != 0x84);
        let selector = match vector {
            0x85 if !start.is_long() => sel::TSS2,
            0x86 => sel::CONFORMING,
            0x87 => sel::DATA32,
            _ if start.is_long() => sel::CODE64,
            _ => sel::CODE32,
        };
        let stack = u64::from(start.is_long() && matches!(vector, 8 | 0x88));
        let low = handler & 0xffff
            | u64::from(selector) << 16
            | stack << 32
            | (present << 7 | dpl << 5 | kind) << 40
            | (handler & 0xffff_0000) << 32;
        if start.is_long() {
            put64(memory, IDT + vector * 16, low);
        } else {
            put64(memory, IDT + vector * 8, low);
        }
    }
}

/// The first 2 MiB, or all of memory in 4 KiB pages, for everybody, one to one; beyond them
/// nothing.
fn page_tables(memory: &mut [u8]) {
    put64(memory, PML4, (PML4 + 0x1000) | 7);
    put64(memory, PML4 + 0x1000, (PML4 + 0x2000) | 7);
    put64(memory, PML4 + 0x2000, 0x87);
    put(
        memory,
        DIRECTORY32,
        &((DIRECTORY32 as u32 + 0xa000) | 7).to_le_bytes(),
    );
    for page in 0..64u32 {
        put(
            memory,
            DIRECTORY32 + 0xa000 + 4 * u64::from(page),
            &(page << 12 | 7).to_le_bytes(),
        );
    }
}

fn task_states(memory: &mut [u8], start: Start) {
    put(memory, TSS + 102, &0x68u16.to_le_bytes());
    // Port 0x3f8 and its neighbours are forbidden, all below 0x100 allowed, the map ends at 0x178.
    put(memory, TSS + 0x68 + 0x20, &[0xff; 0x10]);
    if start.is_long() {
        put64(memory, TSS + 4, STACK0);
        put64(memory, TSS + 12, STACK0 + 0x1000);
        put64(memory, TSS + 36, IST1);
        return;
    }
    put(memory, TSS + 4, &(STACK0 as u32).to_le_bytes());
    put(memory, TSS + 8, &sel::DATA32.to_le_bytes());
    let second = [
        (32, HANDLERS as u32 + 0xff0),
        (36, 0x42),
        (40, 0x1111_1111),
        (44, 0x2222_2222),
        (56, STACK0 as u32 + 0x1000),
        (72, sel::DATA32.into()),
        (76, sel::CODE32.into()),
        (80, sel::DATA32.into()),
        (84, sel::DATA32.into()),
        (92, sel::READ_ONLY.into()),
    ];
    for (offset, value) in second {
        put(memory, TSS2 + offset, &u32::to_le_bytes(value));
    }
}

fn segment(selector: u16, attributes: u16, limit: u32) -> Segment {
    Segment {
        base: 0,
        limit,
        selector,
        attributes,
        unusable: false,
    }
}

fn real_segment(selector: u16, attributes: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        attributes,
        unusable: false,
    }
}

fn put_data(state: &mut CpuState, data: Segment) {
    let segments = &mut state.segments;
    segments.ss = data;
    segments.ds = data;
    segments.es = data;
    segments.fs = data;
    segments.gs = data;
}

/// The state that a guest begins with in a mode.
pub fn state(start: Start) -> CpuState {
    let mut state = CpuState {
        rip: CODE,
        rflags: 2,
        cr0: 0x10,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        xcr0: 1,
        ..CpuState::default()
    };
    state.msrs.pat = 0x0007_0406_0007_0406;
    state.gpr[4] = STACK;
    state.segments.cs = real_segment(0, 0x9b);
    put_data(&mut state, real_segment(0, 0x93));
    state.idtr = TableRegister {
        base: 0,
        limit: 0x3ff,
    };
    state.segments.ldtr = segment(0, 0x82, 0xffff);
    state.segments.tr = segment(0, 0x8b, 0xffff);
    if start != Start::Real {
        state.cr0 |= 1;
        state.gdtr = TableRegister {
            base: GDT,
            limit: 0xff,
        };
        state.idtr = TableRegister {
            base: IDT,
            limit: 0xfff,
        };
        state.segments.tr = segment(sel::TSS, 0x8b, 0x97);
        state.segments.tr.base = TSS;
        put_code_and_data(&mut state, start);
    }
    if start == Start::Paged32 {
        state.cr0 |= 1 << 31;
        state.cr4 = 1 << 4;
        state.cr3 = DIRECTORY32;
    }
    if start.is_long() {
        state.cr0 |= 1 << 31;
        state.cr4 = 1 << 5;
        state.cr3 = PML4;
        state.msrs.efer = 1 << 10 | 1 << 8 | 1;
    }
    state
}

fn put_code_and_data(state: &mut CpuState, start: Start) {
    let all = u32::MAX;
    let (cs, data) = match start {
        Start::Real => return,
        Start::Virtual8086 => {
            state.rflags |= 1 << 17;
            (real_segment(0, 0xf3), real_segment(0, 0xf3))
        }
        Start::Protected16 => (
            segment(sel::CODE16, 0x9b, 0xffff),
            segment(sel::DATA16, 0x93, 0xffff),
        ),
        Start::Protected32 | Start::Paged32 | Start::Compatibility => (
            segment(sel::CODE32, 0xc09b, all),
            segment(sel::DATA32, 0xc093, all),
        ),
        Start::User32 | Start::UserCompatibility => (
            segment(sel::USER_CODE32, 0xc0fb, all),
            segment(sel::USER_DATA32, 0xc0f3, all),
        ),
        Start::Long => (
            segment(sel::CODE64, 0xa09b, all),
            segment(sel::DATA32, 0xc093, all),
        ),
        Start::UserLong => (
            segment(sel::USER_CODE64, 0xa0fb, all),
            segment(sel::USER_DATA32, 0xc0f3, all),
        ),
    };
    state.segments.cs = cs;
    put_data(state, data);
}
