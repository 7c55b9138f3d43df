//! The way into translated code and out of it.
//!
//! [`enter`] is called like a function: it keeps the host's callee-saved registers on the thread's
//! stack, loads the guest's registers from the [`Frame`], points `rsp` into the frame and jumps.
//! Every way out ends in [`leave`], which does the reverse and returns from that call with the number
//! of the site that was left. Nothing is called from translated code: what it can't do itself is done
//! between two entries, and a site can be entered again in its middle.
//!
//! | host register | in guest code |
//! |---|---|
//! | rax rdx rbx rsi rdi rbp r8 r12 r13 r14 | the guest's register of that name |
//! | r9, r10 | the guest's rcx, rsp |
//! | rcx, r11, r15 | scratch |
//! | rsp | the frame |
//! | ymm0 to ymm15, x87, MXCSR, arithmetic flags | the guest's |
//!
//! The guest's r9, r10, r11 and r15 stay in the frame.

#![expect(
    unsafe_code,
    reason = "switches between the host's registers and the guest's, which only assembly can"
)]

use core::arch::{asm, naked_asm};
use core::mem::offset_of;

use x86::xstate;

use super::frame::{BIAS, Frame, X87};
use crate::CpuState;
use crate::fpu::FPU_STATE_SIZE;

const GPR: usize = offset_of!(Frame, state) + offset_of!(CpuState, gpr);

/// Runs translated code at `target` until it leaves; the number of the site that left.
///
/// # Safety
/// `frame` must be a complete [`Frame`] that no other code uses, `target` an address in its vCPU's
/// code cache at which this frame's state may be continued.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn enter(frame: *mut Frame, target: *const u8) -> u32 {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rdi + {host_rsp}], rsp",
        "mov [rdi + {target}], rsi",
        "lea rsp, [rdi + {bias}]",
        "vmovups ymm0, [rdi + {vectors}]",
        "vmovups ymm1, [rdi + {vectors} + 32]",
        "vmovups ymm2, [rdi + {vectors} + 64]",
        "vmovups ymm3, [rdi + {vectors} + 96]",
        "vmovups ymm4, [rdi + {vectors} + 128]",
        "vmovups ymm5, [rdi + {vectors} + 160]",
        "vmovups ymm6, [rdi + {vectors} + 192]",
        "vmovups ymm7, [rdi + {vectors} + 224]",
        "vmovups ymm8, [rdi + {vectors} + 256]",
        "vmovups ymm9, [rdi + {vectors} + 288]",
        "vmovups ymm10, [rdi + {vectors} + 320]",
        "vmovups ymm11, [rdi + {vectors} + 352]",
        "vmovups ymm12, [rdi + {vectors} + 384]",
        "vmovups ymm13, [rdi + {vectors} + 416]",
        "vmovups ymm14, [rdi + {vectors} + 448]",
        "vmovups ymm15, [rdi + {vectors} + 480]",
        "ldmxcsr [rdi + {guest_mxcsr}]",
        // OF by an addition that overflows, the other flags by SAHF.
        "movzx eax, word ptr [rdi + {arith}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [rdi + {gpr}]",
        "mov r9, [rdi + {gpr} + 8]",
        "mov rdx, [rdi + {gpr} + 16]",
        "mov rbx, [rdi + {gpr} + 24]",
        "mov r10, [rdi + {gpr} + 32]",
        "mov rbp, [rdi + {gpr} + 40]",
        "mov rsi, [rdi + {gpr} + 48]",
        "mov r8, [rdi + {gpr} + 64]",
        "mov r12, [rdi + {gpr} + 96]",
        "mov r13, [rdi + {gpr} + 104]",
        "mov r14, [rdi + {gpr} + 112]",
        "mov r11, [rdi + {t0}]",
        "mov r15, [rdi + {t1}]",
        "mov rdi, [rdi + {gpr} + 56]",
        "jmp [rsp - {bias} + {target}]",
        host_rsp = const offset_of!(Frame, host_rsp),
        target = const offset_of!(Frame, target),
        vectors = const offset_of!(Frame, vectors),
        guest_mxcsr = const offset_of!(Frame, guest_mxcsr),
        arith = const offset_of!(Frame, arith),
        gpr = const GPR,
        t0 = const offset_of!(Frame, t0),
        t1 = const offset_of!(Frame, t1),
        bias = const BIAS,
    )
}

/// Where translated code leaves, with the number of its site in `ecx`. Not a function: it returns
/// from the call of [`enter`].
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "mov [rsp - {bias} + {gpr} + 56], rdi",
        "lea rdi, [rsp - {bias}]",
        "mov [rdi + {gpr}], rax",
        "lahf",
        "seto al",
        "mov [rdi + {arith}], ax",
        "mov [rdi + {gpr} + 8], r9",
        "mov [rdi + {gpr} + 16], rdx",
        "mov [rdi + {gpr} + 24], rbx",
        "mov [rdi + {gpr} + 32], r10",
        "mov [rdi + {gpr} + 40], rbp",
        "mov [rdi + {gpr} + 48], rsi",
        "mov [rdi + {gpr} + 64], r8",
        "mov [rdi + {gpr} + 96], r12",
        "mov [rdi + {gpr} + 104], r13",
        "mov [rdi + {gpr} + 112], r14",
        "mov [rdi + {t0}], r11",
        "mov [rdi + {t1}], r15",
        "stmxcsr [rdi + {guest_mxcsr}]",
        "ldmxcsr [rdi + {host_mxcsr}]",
        "vmovups [rdi + {vectors}], ymm0",
        "vmovups [rdi + {vectors} + 32], ymm1",
        "vmovups [rdi + {vectors} + 64], ymm2",
        "vmovups [rdi + {vectors} + 96], ymm3",
        "vmovups [rdi + {vectors} + 128], ymm4",
        "vmovups [rdi + {vectors} + 160], ymm5",
        "vmovups [rdi + {vectors} + 192], ymm6",
        "vmovups [rdi + {vectors} + 224], ymm7",
        "vmovups [rdi + {vectors} + 256], ymm8",
        "vmovups [rdi + {vectors} + 288], ymm9",
        "vmovups [rdi + {vectors} + 320], ymm10",
        "vmovups [rdi + {vectors} + 352], ymm11",
        "vmovups [rdi + {vectors} + 384], ymm12",
        "vmovups [rdi + {vectors} + 416], ymm13",
        "vmovups [rdi + {vectors} + 448], ymm14",
        "vmovups [rdi + {vectors} + 480], ymm15",
        "vzeroupper",
        "mov eax, ecx",
        "mov rsp, [rdi + {host_rsp}]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        host_rsp = const offset_of!(Frame, host_rsp),
        vectors = const offset_of!(Frame, vectors),
        guest_mxcsr = const offset_of!(Frame, guest_mxcsr),
        host_mxcsr = const offset_of!(Frame, host_mxcsr),
        arith = const offset_of!(Frame, arith),
        gpr = const GPR,
        t0 = const offset_of!(Frame, t0),
        t1 = const offset_of!(Frame, t1),
        bias = const BIAS,
    )
}

/// Makes the guest's vector and x87 registers current: x87 in the host's own registers, vectors in
/// the frame from where [`enter`] loads them.
pub(crate) fn load_fpu(frame: &mut Frame) {
    let bv = frame.fpu.xstate_bv();
    frame.guest_mxcsr = frame.fpu.mxcsr() & host_mxcsr_mask();
    load_vectors(&mut frame.vectors, frame.fpu.image(), bv);
    frame.x87 = X87::default();
    if bv & 1 != 0 {
        frame.x87.pointers = frame.fpu.pointers();
    }
    load_x87(frame.fpu.image(), bv);
}

/// Vector registers out of an image.
fn load_vectors(vectors: &mut [[u8; 32]; 16], image: &[u8; FPU_STATE_SIZE], bv: u64) {
    for (index, vector) in vectors.iter_mut().enumerate() {
        let (low, high) = vector.split_at_mut(16);
        let part = |present: bool, at: usize, part: &mut [u8]| {
            if present {
                part.copy_from_slice(&image[at + 16 * index..][..16]);
            } else {
                part.fill(0);
            }
        };
        part(bv & xstate::SSE != 0, xstate::XMM_OFFSET, low);
        part(bv & xstate::AVX != 0, xstate::AVX_OFFSET, high);
    }
}

/// What `XRSTOR` reads of an area, of x87 state alone.
#[repr(C, align(64))]
struct X87Area([u8; xstate::LEGACY_SIZE + xstate::HEADER_SIZE]);

/// x87 registers out of an image. The host's pointers mean nothing: they would be those of translated
/// code.
fn load_x87(image: &[u8; FPU_STATE_SIZE], bv: u64) {
    let mut area = X87Area([0; _]);
    let bytes = &mut area.0;
    bytes[..6].copy_from_slice(&image[..6]);
    bytes[32..xstate::XMM_OFFSET].copy_from_slice(&image[32..xstate::XMM_OFFSET]);
    bytes[xstate::XSTATE_BV_OFFSET] = (bv & xstate::X87) as u8;
    // SAFETY: the area is 64-byte aligned and its header valid for the standard format; x87 state
    // is the caller's to lose between two function calls (the ABI has it empty), and its control
    // word was kept by `save_host_fpu`.
    unsafe {
        asm!(
            "xrstor [{area}]",
            area = in(reg) area.0.as_ptr(),
            in("eax") 1, in("edx") 0,
            options(nostack, readonly)
        );
    }
}

/// Brings the guest's vector and x87 registers into the image, and leaves x87 as they are.
pub(crate) fn store_fpu(frame: &mut Frame) {
    // SAFETY: the image is 64-byte aligned and as large as the components saved.
    unsafe {
        asm!(
            "xsave [{image}]",
            image = in(reg) frame.fpu.bytes_mut().as_mut_ptr(),
            in("eax") 1, in("edx") 0,
            options(nostack)
        );
    }
    frame.fpu.set_mxcsr(frame.guest_mxcsr);
    let vectors = frame.vectors;
    let image = frame.fpu.bytes_mut();
    for (index, vector) in vectors.iter().enumerate() {
        image[160 + 16 * index..][..16].copy_from_slice(&vector[..16]);
        image[576 + 16 * index..][..16].copy_from_slice(&vector[16..]);
    }
    image[28..32].copy_from_slice(&host_mxcsr_mask().to_le_bytes());
    frame.fpu.set_xstate_bv(7);
    frame.fpu.set_pointers(frame.x87.pointers);
}

/// Whether an unmasked x87 exception of the guest waits.
pub(crate) fn has_pending_x87() -> bool {
    let status: u16;
    // SAFETY: reads the status word, and never waits.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack)) };
    status & 0x80 != 0
}

/// Keeps the host's control words.
pub(crate) fn save_host_fpu(frame: &mut Frame) {
    // SAFETY: both instructions only store.
    unsafe {
        asm!(
            "fnstcw [{fcw}]",
            "stmxcsr [{mxcsr}]",
            fcw = in(reg) &raw mut frame.host_fcw,
            mxcsr = in(reg) &raw mut frame.host_mxcsr,
            options(nostack)
        );
    }
}

/// Gives the host its x87 control word back and empties the x87 registers.
pub(crate) fn restore_host_fpu(frame: &Frame) {
    // SAFETY: FNINIT leaves nothing pending, so that FLDCW can't trap.
    unsafe {
        asm!(
            "fninit",
            "fldcw [{fcw}]",
            fcw = in(reg) &raw const frame.host_fcw,
            options(nostack)
        );
    }
}

/// The bits of MXCSR that the host has (SDM 1, 11.6.6).
pub(crate) fn host_mxcsr_mask() -> u32 {
    #[repr(align(16))]
    struct Area([u8; 512]);
    static MASK: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *MASK.get_or_init(|| {
        let mut area = Area([0; 512]);
        // SAFETY: writes 512 aligned bytes.
        unsafe { asm!("fxsave64 [{}]", in(reg) area.0.as_mut_ptr(), options(nostack)) };
        match u32::from_le_bytes([area.0[28], area.0[29], area.0[30], area.0[31]]) {
            0 => 0xffbf,
            mask => mask,
        }
    })
}
