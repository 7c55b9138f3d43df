//! What goes into a test and what comes out: plain data that both sides understand.
//!
//! The types are `repr(C)` and hold no pointers: they lie in memory shared with the sandbox.

use crate::layout::{DATA_BYTES, WRITABLE_BYTES};

/// Indices into [`State::selectors`], in the encoding's order (SDM 2A, table 3-1).
pub mod selector {
    #![allow(missing_docs, reason = "the names say it")]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bytes of an XSAVE image in standard format with x87, SSE and AVX state (SDM 1, 13.4).
pub const XSAVE_BYTES: usize = 512 + 64 + 256;
/// Bytes of the legacy area that hold state: control words, x87 registers, XMM registers.
pub const LEGACY_BYTES: usize = 416;
/// Where the upper halves of the YMM registers lie in the image.
pub const YMM_OFFSET: usize = 576;

/// x87, SSE and AVX state.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Extended(pub [u8; XSAVE_BYTES]);

impl Extended {
    /// The state after a reset by `XRSTOR`: empty x87 stack, all exceptions masked, zeros.
    pub const fn initial() -> Self {
        let mut image = [0; XSAVE_BYTES];
        image[0] = 0x7f; // FCW = 0x037f
        image[1] = 0x03;
        image[24] = 0x80; // MXCSR = 0x1f80
        image[25] = 0x1f;
        image[512] = 7; // XSTATE_BV: x87, SSE, AVX
        Self(image)
    }

    /// A little-endian word of the image.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.0[offset], self.0[offset + 1]])
    }

    /// Puts a little-endian word into the image.
    pub fn set_word(&mut self, offset: usize, value: u16) {
        self.0[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from(self.word(24)) | u32::from(self.word(26)) << 16
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.0[24..28].copy_from_slice(&value.to_le_bytes());
    }

    /// The bytes of ST(index) with its 6 bytes of padding.
    pub fn st_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self.0[32 + 16 * index..48 + 16 * index]
    }

    /// Sets YMM(index).
    pub fn set_ymm(&mut self, index: usize, value: &[u8; 32]) {
        self.0[160 + 16 * index..][..16].copy_from_slice(&value[..16]);
        self.0[YMM_OFFSET + 16 * index..][..16].copy_from_slice(&value[16..]);
    }

    /// YMM(index).
    pub fn ymm(&self, index: usize) -> [u8; 32] {
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.0[160 + 16 * index..][..16]);
        value[16..].copy_from_slice(&self.0[YMM_OFFSET + 16 * index..][..16]);
        value
    }
}

/// The registers that user code sees.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// In the encoding's order: rax rcx rdx rbx rsp rbp rsi rdi r8 to r15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// See [`selector`].
    pub selectors: [u16; 6],
    /// x87, SSE, AVX.
    pub extended: Extended,
}

impl State {
    /// All zero, but for what must not be.
    pub const fn initial() -> Self {
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 0x202,
            fs_base: 0,
            gs_base: 0,
            selectors: Mode::Long.selectors(),
            extended: Extended::initial(),
        }
    }
}

/// How the processor reads the code. All at CPL 3.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode with a flat 32-bit code segment.
    Compat32,
    /// Compatibility mode with a 16-bit code segment, and 16-bit data segments with bases and limits
    /// ([`crate::local`]).
    Compat16,
}

impl Mode {
    /// 64, 32 or 16.
    pub fn bitness(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Compat32 => 32,
            Self::Compat16 => 16,
        }
    }

    /// Selectors as Linux gives them to its processes (`arch/x86/include/asm/segment.h`), or of the local table.
    pub const fn selectors(self) -> [u16; 6] {
        match self {
            Self::Long => [0, 0x33, 0x2b, 0, 0, 0],
            Self::Compat32 => [0x2b, 0x23, 0x2b, 0x2b, 0, 0],
            Self::Compat16 => crate::local::SELECTORS,
        }
    }

    /// Where CS begins.
    pub fn code_base(self) -> u64 {
        match self {
            Self::Long | Self::Compat32 => 0,
            Self::Compat16 => crate::layout::CODE.raw(),
        }
    }

    /// Where the data segments begin.
    pub fn data_base(self) -> u64 {
        match self {
            Self::Long | Self::Compat32 => 0,
            Self::Compat16 => crate::layout::WINDOWS[0].raw(),
        }
    }
}

/// The longest program.
pub const PROGRAM_BYTES: usize = 2048;

/// Bytes to execute. What surrounds them in the code window is [`crate::layout::FILLER`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Program {
    /// How to read them.
    pub mode: Mode,
    /// Where they begin, from the start of the code window; also the entry point.
    pub offset: u32,
    /// How many of `bytes` are used.
    pub len: u32,
    /// The bytes.
    pub bytes: [u8; PROGRAM_BYTES],
}

impl Program {
    /// A program of these bytes at this place of the code window. `None` where they don't fit.
    pub fn new(mode: Mode, offset: usize, code: &[u8]) -> Option<Self> {
        if code.len() > PROGRAM_BYTES || offset + code.len() > crate::layout::CODE_BYTES {
            return None;
        }
        let mut bytes = [0; PROGRAM_BYTES];
        bytes[..code.len()].copy_from_slice(code);
        Some(Self {
            mode,
            offset: offset as u32,
            len: code.len() as u32,
            bytes,
        })
    }

    /// The bytes in use.
    pub fn code(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }

    /// RIP of the first byte.
    pub fn entry(&self) -> u64 {
        crate::layout::CODE.raw() + u64::from(self.offset) - self.mode.code_base()
    }
}

/// Bytes laid over the pattern that fills the data pages.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Patch {
    /// From the start of the data.
    pub offset: u32,
    /// How many bytes are used.
    pub len: u32,
    /// The bytes.
    pub bytes: [u8; 64],
}

/// One test: which program, from which state.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Case {
    /// Index of the program in its batch.
    pub program: u32,
    /// The registers at the start; `rip` and the selectors come from the program.
    pub state: State,
    /// The memory at the start, over the batch's pattern.
    pub patches: [Patch; 3],
}

/// Tests that are handed over together.
pub struct Batch {
    /// What fills the data before the patches.
    pub pattern: Box<[u8; DATA_BYTES]>,
    /// The programs.
    pub programs: Vec<Program>,
    /// The tests.
    pub cases: Vec<Case>,
}

impl Batch {
    /// The program of a case.
    pub fn program(&self, case: usize) -> &Program {
        &self.programs[self.cases[case].program as usize]
    }
}

/// How a test ended: the exception and what came with it. Every test ends by one, if only by
/// the `INT3` behind its last instruction.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The vector, or [`Ending::TIMEOUT`] or [`Ending::FAILED`].
    pub vector: u32,
    /// The error code, 0 where the exception has none.
    pub error_code: u32,
    /// CR2 of a page fault, else 0.
    pub cr2: u64,
}

impl Ending {
    /// The test ran too long.
    pub const TIMEOUT: u32 = 0x100;
    /// The side under test could not go on: an error of its own.
    pub const FAILED: u32 = 0x101;
    /// The test wanted a service of the kernel, by a path that the generator didn't foresee.
    pub const SYSTEM_CALL: u32 = 0x102;

    /// Whether the guest got an exception, so that the states can be compared.
    pub fn is_exception(self) -> bool {
        self.vector < 32
    }
}

/// What came out of a test.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// The registers at that moment.
    pub state: State,
    /// The writable data.
    pub memory: [u8; WRITABLE_BYTES],
}

/// Something that runs batches: the physical CPU, or the one under test.
pub trait Executor {
    /// What reports call it.
    fn name(&self) -> &'static str;
    /// Runs every case from its own initial state and appends one outcome each.
    fn run(&mut self, batch: &Batch, outcomes: &mut Vec<Outcome>) -> anyhow::Result<()>;
    /// What happened besides since the last call, for the reader.
    fn remarks(&mut self) -> Vec<String> {
        Vec::new()
    }
}
