//! x87, MMX, SSE and AVX registers: an XSAVE image in the standard format (SDM 1, 13.4).

use bitflags::bitflags;
use x86::xstate;

/// Size of the image: legacy region, header, upper halves of YMM0 to YMM15.
pub const FPU_STATE_SIZE: usize = xstate::AVX_OFFSET + xstate::AVX_SIZE;

/// FOP, FIP and FDP in the legacy region.
const POINTERS: core::ops::Range<usize> = 6..24;
/// The error summary in FSW: an unmasked exception waits.
const FSW_ES: u16 = 1 << 7;

bitflags! {
    /// What a CPU does not keep of the x87 instruction and data pointers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct PointerRules: u8 {
        /// `FXSAVE` and the XSAVE family store zeros unless an unmasked exception waits: AMD's CPUs
        /// (APM 2, 11.4.4; CPUID 8000_0008, EBX bit 2).
        const SAVED_IF_PENDING = 1 << 0;
        /// The selectors are always zero (CPUID 7, EBX bit 13).
        const NO_SELECTORS = 1 << 1;
        /// The data pointer is kept for unmasked exceptions only (CPUID 7, EBX bit 6).
        const DATA_IF_PENDING = 1 << 2;
    }
}

/// The x87 instruction and data pointers (SDM 1, 8.1.8).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pointers {
    pub(crate) opcode: u16,
    pub(crate) ip: u64,
    pub(crate) cs: u16,
    pub(crate) dp: u64,
    pub(crate) ds: u16,
}

/// The vector and floating-point registers of one vCPU while it is not in guest code.
///
/// `XSTATE_BV` in the header tells which components are not in their initial state; the image holds
/// the initial values of the others too, except where the host's `XSAVE` left them out. The x87
/// pointers in it are the guest's, in the layout with 64-bit addresses.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct FpuState {
    image: [u8; FPU_STATE_SIZE],
    /// FCS and FDS, for which that layout has no room.
    selectors: [u16; 2],
}

impl FpuState {
    /// The whole image.
    pub fn image(&self) -> &[u8; FPU_STATE_SIZE] {
        &self.image
    }

    /// The whole image, to be changed. FCS and FDS, which it doesn't hold, become zero.
    pub fn image_mut(&mut self) -> &mut [u8; FPU_STATE_SIZE] {
        self.selectors = [0; 2];
        &mut self.image
    }

    /// The same, and FCS and FDS stay.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8; FPU_STATE_SIZE] {
        &mut self.image
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.image[at..at + N]);
        bytes
    }

    /// `XSTATE_BV`: which components are not in their initial state.
    pub fn xstate_bv(&self) -> u64 {
        u64::from_le_bytes(self.bytes(xstate::XSTATE_BV_OFFSET))
    }

    /// Sets `XSTATE_BV`.
    pub fn set_xstate_bv(&mut self, value: u64) {
        self.image[xstate::XSTATE_BV_OFFSET..][..8].copy_from_slice(&value.to_le_bytes());
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.bytes(xstate::MXCSR_OFFSET))
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.image[xstate::MXCSR_OFFSET..][..4].copy_from_slice(&value.to_le_bytes());
    }

    /// A word of the image.
    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    /// Sets a word of the image.
    pub(crate) fn set_word(&mut self, at: usize, value: u16) {
        self.image[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Whether an unmasked x87 exception waits for the next instruction that looks.
    pub(crate) fn is_exception_pending(&self) -> bool {
        self.word(2) & FSW_ES != 0
    }

    /// The x87 pointers.
    pub(crate) fn pointers(&self) -> Pointers {
        Pointers {
            opcode: self.word(6),
            ip: u64::from_le_bytes(self.bytes(8)),
            cs: self.selectors[0],
            dp: u64::from_le_bytes(self.bytes(16)),
            ds: self.selectors[1],
        }
    }

    /// Sets the x87 pointers.
    pub(crate) fn set_pointers(&mut self, pointers: Pointers) {
        self.set_word(6, pointers.opcode & 0x7ff);
        self.image[8..16].copy_from_slice(&pointers.ip.to_le_bytes());
        self.image[16..24].copy_from_slice(&pointers.dp.to_le_bytes());
        self.selectors = [pointers.cs, pointers.ds];
    }

    /// The pointers as instructions show them on a CPU with these rules.
    pub(crate) fn visible_pointers(&self, rules: PointerRules) -> Pointers {
        let mut pointers = self.pointers();
        if rules.contains(PointerRules::NO_SELECTORS) {
            (pointers.cs, pointers.ds) = (0, 0);
        }
        if rules.contains(PointerRules::DATA_IF_PENDING) && !self.is_exception_pending() {
            (pointers.dp, pointers.ds) = (0, 0);
        }
        pointers
    }

    /// The first bytes of the legacy region, up to MXCSR, as `FXSAVE` and the XSAVE family store
    /// them: with 64-bit addresses, or with 32-bit ones and selectors.
    pub(crate) fn control_to_save(&self, rules: PointerRules, layout: Layout) -> [u8; 24] {
        let mut saved: [u8; 24] = self.bytes(0);
        saved[POINTERS].fill(0);
        if rules.contains(PointerRules::SAVED_IF_PENDING) && !self.is_exception_pending() {
            return saved;
        }
        let pointers = self.visible_pointers(rules);
        saved[6..8].copy_from_slice(&pointers.opcode.to_le_bytes());
        saved[8..16].copy_from_slice(&layout.pack(pointers.ip, pointers.cs));
        saved[16..24].copy_from_slice(&layout.pack(pointers.dp, pointers.ds));
        saved
    }

    /// Takes the pointers over from an image of this layout, which was copied as it stands.
    pub(crate) fn loaded_pointers(&mut self, layout: Layout) {
        let mut pointers = self.pointers();
        (pointers.ip, pointers.cs) = layout.unpack(pointers.ip);
        (pointers.dp, pointers.ds) = layout.unpack(pointers.dp);
        self.set_pointers(pointers);
    }
}

/// How addresses of 64 bits, or of 32 bits and a selector, share eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// With `REX.W`.
    Wide,
    /// Without.
    Narrow,
}

impl Layout {
    fn pack(self, address: u64, selector: u16) -> [u8; 8] {
        match self {
            Self::Wide => address,
            Self::Narrow => address & 0xffff_ffff | u64::from(selector) << 32,
        }
        .to_le_bytes()
    }

    fn unpack(self, field: u64) -> (u64, u16) {
        match self {
            Self::Wide => (field, 0),
            Self::Narrow => (field & 0xffff_ffff, (field >> 32) as u16),
        }
    }
}

impl Default for FpuState {
    /// The state after a reset (SDM 3A, table 11-1): every component initial.
    fn default() -> Self {
        let mut image = [0; FPU_STATE_SIZE];
        image[..2].copy_from_slice(&xstate::FCW_INIT.to_le_bytes());
        image[xstate::MXCSR_OFFSET..][..4].copy_from_slice(&xstate::MXCSR_INIT.to_le_bytes());
        image[xstate::MXCSR_OFFSET + 4..][..4].copy_from_slice(&mxcsr_mask().to_le_bytes());
        Self {
            image,
            selectors: [0; 2],
        }
    }
}

impl std::fmt::Debug for FpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FpuState")
            .field("xstate_bv", &self.xstate_bv())
            .field("mxcsr", &self.mxcsr())
            .finish_non_exhaustive()
    }
}

/// The bits of MXCSR that exist: those of the host, which loads it for the guest (SDM 1, 11.6.6).
pub(crate) fn mxcsr_mask() -> u32 {
    crate::engine::host_mxcsr_mask()
}
