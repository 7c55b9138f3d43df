//! `KVM_GET_FPU`, `KVM_GET_XSAVE`, `KVM_GET_XCRS` and their setters: the XSAVE image in the standard
//! format (SDM 1, 13.4), which is what the CPU keeps.

use cpu::fpu::{FPU_STATE_SIZE, FpuState};
use kvm_bindings::{kvm_fpu, kvm_xcr, kvm_xcrs, kvm_xsave};
use x86::xstate;

use super::Vcpu;
use crate::cpuid::XCR0;
use crate::errno::Errno;

/// MXCSR bits that exist.
const MXCSR_MASK: u32 = 0x2_ffff;
/// Where Linux says which components an image may hold.
const SOFTWARE_RESERVED: usize = 464;
/// Most entries of `struct kvm_xcrs`.
const MAX_XCRS: u32 = 16;
/// The x87 control and data pointers and registers, and the XMM registers, in the legacy region.
const ST: usize = 32;

fn word(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

fn long(image: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn to_kvm_fpu(state: &FpuState) -> kvm_fpu {
    let image = state.image();
    let mut fpu = kvm_fpu {
        fcw: word(image, 0),
        fsw: word(image, 2),
        ftwx: image[4],
        last_opcode: word(image, 6),
        last_ip: long(image, 8),
        last_dp: long(image, 16),
        ..Default::default()
    };
    for (i, register) in fpu.fpr.iter_mut().enumerate() {
        register.copy_from_slice(&image[ST + 16 * i..][..16]);
    }
    for (i, register) in fpu.xmm.iter_mut().enumerate() {
        register.copy_from_slice(&image[xstate::XMM_OFFSET + 16 * i..][..16]);
    }
    fpu
}

fn from_kvm_fpu(state: &mut FpuState, fpu: &kvm_fpu) {
    let image = state.image_mut();
    image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
    image[4..6].copy_from_slice(&u16::from(fpu.ftwx).to_le_bytes());
    image[6..8].copy_from_slice(&fpu.last_opcode.to_le_bytes());
    image[8..16].copy_from_slice(&fpu.last_ip.to_le_bytes());
    image[16..24].copy_from_slice(&fpu.last_dp.to_le_bytes());
    for (i, register) in fpu.fpr.iter().enumerate() {
        image[ST + 16 * i..][..16].copy_from_slice(register);
    }
    for (i, register) in fpu.xmm.iter().enumerate() {
        image[xstate::XMM_OFFSET + 16 * i..][..16].copy_from_slice(register);
    }
    let present = state.xstate_bv() | xstate::X87 | xstate::SSE;
    state.set_xstate_bv(present);
}

/// The image for the program: components that are in their initial state show initial values.
fn to_image(state: &FpuState) -> Vec<u8> {
    let present = state.xstate_bv();
    let initial = FpuState::default();
    let mut image = state.image().to_vec();
    let mut forget = |component: u64, from: usize, to: usize| {
        if present & component == 0 {
            image[from..to].copy_from_slice(&initial.image()[from..to]);
        }
    };
    forget(xstate::X87, 0, xstate::MXCSR_OFFSET);
    forget(xstate::X87, ST, xstate::XMM_OFFSET);
    forget(xstate::SSE, xstate::XMM_OFFSET, 416);
    forget(xstate::AVX, xstate::AVX_OFFSET, FPU_STATE_SIZE);
    if present & (xstate::SSE | xstate::AVX) == 0 {
        image[24..28].copy_from_slice(&xstate::MXCSR_INIT.to_le_bytes());
    }
    image[SOFTWARE_RESERVED..SOFTWARE_RESERVED + 8].copy_from_slice(&XCR0.to_le_bytes());
    image
}

fn from_image(state: &mut FpuState, image: &[u8]) -> Result<(), Errno> {
    let present = long(image, xstate::XSTATE_BV_OFFSET);
    let header = &image[xstate::XCOMP_BV_OFFSET..xstate::EXTENDED_OFFSET];
    if present & !XCR0 != 0 || header.iter().any(|byte| *byte != 0) {
        return Err(Errno::EINVAL);
    }
    let mxcsr = u32::from_le_bytes([image[24], image[25], image[26], image[27]]);
    let sse = present & (xstate::SSE | xstate::AVX) != 0;
    if sse && mxcsr & !MXCSR_MASK != 0 {
        return Err(Errno::EINVAL);
    }
    state.image_mut().copy_from_slice(&image[..FPU_STATE_SIZE]);
    state.image_mut()[SOFTWARE_RESERVED..xstate::LEGACY_SIZE].fill(0);
    let image = to_image(state);
    state.image_mut()[..SOFTWARE_RESERVED].copy_from_slice(&image[..SOFTWARE_RESERVED]);
    state.image_mut()[xstate::AVX_OFFSET..].copy_from_slice(&image[xstate::AVX_OFFSET..]);
    Ok(())
}

impl Vcpu {
    /// `KVM_GET_FPU`. As in the kernel, `mxcsr` is left at 0.
    pub fn get_fpu(&self) -> kvm_fpu {
        to_kvm_fpu(self.lock().core.fpu())
    }

    /// `KVM_SET_FPU`. As in the kernel, `mxcsr` is not taken.
    pub fn set_fpu(&self, fpu: &kvm_fpu) {
        from_kvm_fpu(self.lock().core.fpu_mut(), fpu);
    }

    /// `KVM_GET_XSAVE` and `KVM_GET_XSAVE2`.
    pub fn get_xsave(&self) -> kvm_xsave {
        let image = to_image(self.lock().core.fpu());
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(image.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        xsave
    }

    /// `KVM_SET_XSAVE`: an image with components or header bits that don't exist is `EINVAL`.
    pub fn set_xsave(&self, xsave: &kvm_xsave) -> Result<(), Errno> {
        let image: Vec<u8> = xsave.region.iter().flat_map(|w| w.to_le_bytes()).collect();
        from_image(self.lock().core.fpu_mut(), &image)
    }

    /// `KVM_GET_XCRS`: XCR0 alone.
    pub fn get_xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            xcr: 0,
            value: self.lock().core.state().xcr0,
            ..Default::default()
        };
        xcrs
    }

    /// `KVM_SET_XCRS`: a value that the guest's CPUID doesn't allow is `EINVAL`.
    pub fn set_xcrs(&self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        if xcrs.nr_xcrs > MAX_XCRS || xcrs.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let given = &xcrs.xcrs[..xcrs.nr_xcrs as usize];
        let Some(xcr0) = given.iter().find(|x| x.xcr == 0) else {
            return Ok(());
        };
        let mut inner = self.lock();
        let allowed = inner.machine.cpuid.xcr0() | xstate::X87;
        if !xstate::xcr0_is_valid(xcr0.value, allowed) {
            return Err(Errno::EINVAL);
        }
        inner.core.state_mut().xcr0 = xcr0.value;
        self.mirror_cpuid(&mut inner);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fpu_round_trip() {
        let mut fpu = kvm_fpu {
            fcw: 0x27f,
            fsw: 0x3800,
            ftwx: 0x80,
            last_ip: 0x1234,
            ..Default::default()
        };
        fpu.fpr[7] = [7; 16];
        fpu.xmm[15] = [15; 16];
        let mut state = FpuState::default();
        from_kvm_fpu(&mut state, &fpu);
        assert_eq!(to_kvm_fpu(&state), fpu);
        assert_eq!(state.mxcsr(), xstate::MXCSR_INIT);
    }

    #[test]
    fn absent_components_show_initial_values() {
        let mut state = FpuState::default();
        state.image_mut()[xstate::AVX_OFFSET] = 9;
        state.image_mut()[0] = 0;
        state.set_xstate_bv(0);
        let image = to_image(&state);
        assert_eq!(image[xstate::AVX_OFFSET], 0);
        assert_eq!(word(&image, 0), xstate::FCW_INIT);
    }

    #[test]
    fn bad_headers_are_refused() {
        let mut state = FpuState::default();
        let good = to_image(&state);
        assert_eq!(from_image(&mut state, &good), Ok(()));
        for (at, value) in [(512, 0x80), (520, 1), (528, 1), (575, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(
                from_image(&mut state, &bad),
                Err(Errno::EINVAL),
                "byte {at}"
            );
        }
        let mut bad = good;
        bad[512] = 2;
        bad[27] = 0x80;
        assert_eq!(from_image(&mut state, &bad), Err(Errno::EINVAL), "MXCSR");
    }
}
