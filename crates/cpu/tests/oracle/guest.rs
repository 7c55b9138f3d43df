//! A guest and what became of it.

use cpu::CpuState;
use cpu::system::GuestDebug;

use crate::layout::{self, CODE, Start};

/// What a guest begins with.
#[derive(Clone)]
pub struct Guest {
    pub name: String,
    pub state: CpuState,
    pub memory: Vec<u8>,
    pub wishes: Wishes,
}

/// What the monitor does with a guest besides running it.
#[derive(Clone, Copy, Default)]
pub struct Wishes {
    /// An interrupt for when one can be taken: the monitor asks for the interrupt window.
    pub interrupt: Option<u8>,
    /// An NMI is pending.
    pub nmi: bool,
    /// The monitor's own debugging.
    pub debug: GuestDebug,
}

/// One thing that the monitor saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Out {
        port: u16,
        data: Vec<u8>,
    },
    In {
        port: u16,
        size: u8,
        count: u32,
    },
    Write {
        gpa: u64,
        data: Vec<u8>,
    },
    Read {
        gpa: u64,
        len: u8,
    },
    Debug {
        vector: u8,
        pc: u64,
        dr6: u64,
    },
    /// An interrupt can be taken here.
    Window {
        rip: u64,
    },
}

/// Why a guest is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Halt,
    Shutdown,
    /// The accelerator gave up.
    Failed(String),
    /// More exits than any guest makes.
    Endless,
}

/// What became of a guest.
pub struct Outcome {
    pub seen: Vec<Seen>,
    pub end: End,
    pub state: CpuState,
    pub memory: Vec<u8>,
}

/// The most exits of one guest.
pub const MAX_EXITS: usize = 64;

/// What an input port or a device register gives: bytes that tell where they come from.
pub fn input(from: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|n| (from.wrapping_mul(7) + n * 13 + 1) as u8)
        .collect()
}

impl Guest {
    /// A guest of this code in a mode.
    pub fn new(name: impl Into<String>, start: Start, code: &[u8]) -> Self {
        let mut guest = Self {
            name: format!("{start:?}: {}", name.into()),
            state: layout::state(start),
            memory: layout::memory(start),
            wishes: Wishes::default(),
        };
        guest.put(CODE, code);
        guest
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}
