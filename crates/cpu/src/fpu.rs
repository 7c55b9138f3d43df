//! x87, MMX, SSE and AVX registers: an XSAVE image in the standard format (SDM 1, 13.4).

use x86::xstate;

/// Size of the image: legacy region, header, upper halves of YMM0 to YMM15.
pub const FPU_STATE_SIZE: usize = xstate::AVX_OFFSET + xstate::AVX_SIZE;

/// The vector and floating-point registers of one vCPU while it is not in guest code.
///
/// `XSTATE_BV` in the header tells which components are not in their initial state; the image holds
/// the initial values of the others too, except where the host's `XSAVE` left them out.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct FpuState {
    image: [u8; FPU_STATE_SIZE],
}

impl FpuState {
    /// The whole image.
    pub fn image(&self) -> &[u8; FPU_STATE_SIZE] {
        &self.image
    }

    /// The whole image, to be changed.
    pub fn image_mut(&mut self) -> &mut [u8; FPU_STATE_SIZE] {
        &mut self.image
    }

    /// `XSTATE_BV`: which components are not in their initial state.
    pub fn xstate_bv(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.image[xstate::XSTATE_BV_OFFSET..][..8]);
        u64::from_le_bytes(bytes)
    }

    /// Sets `XSTATE_BV`.
    pub fn set_xstate_bv(&mut self, value: u64) {
        self.image[xstate::XSTATE_BV_OFFSET..][..8].copy_from_slice(&value.to_le_bytes());
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.image[xstate::MXCSR_OFFSET..][..4]);
        u32::from_le_bytes(bytes)
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.image[xstate::MXCSR_OFFSET..][..4].copy_from_slice(&value.to_le_bytes());
    }
}

impl Default for FpuState {
    /// The state after a reset (SDM 3A, table 11-1): every component initial.
    fn default() -> Self {
        let mut image = [0; FPU_STATE_SIZE];
        image[..2].copy_from_slice(&xstate::FCW_INIT.to_le_bytes());
        image[xstate::MXCSR_OFFSET..][..4].copy_from_slice(&xstate::MXCSR_INIT.to_le_bytes());
        image[xstate::MXCSR_OFFSET + 4..][..4].copy_from_slice(&0xffffu32.to_le_bytes());
        Self { image }
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
