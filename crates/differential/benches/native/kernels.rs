//! The code that is timed: position-independent, so that the same bytes run here and in the guest.
//!
//! A kernel is called with a buffer in RDI and a number of rounds in RSI, and returns by `RET`. It
//! finds data by offsets from RDI alone. Callee-saved registers are kept.

#![expect(unsafe_code, reason = "names machine code, and reads its bytes")]

use std::arch::global_asm;

/// What a kernel needs to find in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Data {
    /// Anything.
    Plain,
    /// A cycle of offsets through so many bytes, one in each cache line, in random order.
    Ring(usize),
}

/// A piece of code, its group and the least ratio to native that it must reach.
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    pub(crate) group: &'static str,
    pub(crate) bar: f64,
    pub(crate) data: Data,
    pub(crate) code: &'static [u8],
    pub(crate) entry: extern "sysv64" fn(*mut u8, u64) -> u64,
}

macro_rules! kernels {
    ($($name:ident $group:literal $bar:literal $data:expr, $asm:literal;)*) => {
        $(global_asm!(
            ".p2align 6",
            concat!(".globl kernel_", stringify!($name)),
            concat!(".globl kernel_end_", stringify!($name)),
            concat!("kernel_", stringify!($name), ":"),
            $asm,
            concat!("kernel_end_", stringify!($name), ":"),
        );)*

        /// All kernels.
        pub(crate) fn all() -> Vec<Kernel> {
            vec![$({
                mod symbols {
                    unsafe extern "sysv64" {
                        #[link_name = concat!("kernel_", stringify!($name))]
                        pub(super) safe fn start(buffer: *mut u8, rounds: u64) -> u64;
                        #[link_name = concat!("kernel_end_", stringify!($name))]
                        pub(super) safe fn end();
                    }
                }
                Kernel {
                    name: stringify!($name),
                    group: $group,
                    bar: $bar,
                    data: $data,
                    code: between(symbols::start as *const u8, symbols::end as *const u8),
                    entry: symbols::start,
                }
            }),*]
        }
    };
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both are labels of one `global_asm!`, in this order.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

kernels! {
    integer_mix "registers" 0.9 Data::Plain, "
        mov eax, 1
        mov ecx, 7
        mov rdx, 0x9e3779b97f4a7c15
    2:  imul rax, rdx
        add rax, rcx
        ror rax, 13
        xor rcx, rax
        lea r8, [rcx + rax*4 + 1]
        and r8d, 0xffff
        add rcx, r8
        dec rsi
        jnz 2b
        ret";
    collatz "registers" 0.9 Data::Plain, "
        xor edx, edx
    2:  lea rax, [rsi + 1]
    3:  test al, 1
        jz 4f
        lea rax, [rax + rax*2 + 1]
    4:  shr rax, 1
        inc rdx
        cmp rax, 1
        ja 3b
        dec rsi
        jnz 2b
        mov rax, rdx
        ret";
    carry_chain "registers" 0.9 Data::Plain, "
        push rbx
        mov eax, 1
        mov ebx, 3
        mov ecx, 5
        xor edx, edx
    2:  add rax, rbx
        adc rbx, rcx
        adc rcx, rdx
        sbb rdx, rax
        cmp rax, rbx
        cmovb rax, rcx
        setg r8b
        movzx r8d, r8b
        add rdx, r8
        dec rsi
        jnz 2b
        pop rbx
        ret";
    sse_single "vectors" 0.7 Data::Plain, "
        pxor xmm0, xmm0
        pxor xmm1, xmm1
        pxor xmm2, xmm2
        pxor xmm3, xmm3
        pcmpeqd xmm4, xmm4
        psrld xmm4, 25
        pslld xmm4, 23
    2:  mulps xmm0, xmm4
        addps xmm1, xmm4
        mulps xmm2, xmm4
        addps xmm3, xmm4
        shufps xmm0, xmm1, 0x1b
        minps xmm2, xmm3
        dec rsi
        jnz 2b
        movd eax, xmm0
        ret";
    scalar_double "vectors" 0.7 Data::Plain, "
        mov eax, 3
        cvtsi2sd xmm0, eax
        cvtsi2sd xmm1, eax
    2:  mulsd xmm0, xmm1
        addsd xmm0, xmm1
        sqrtsd xmm0, xmm0
        ucomisd xmm0, xmm1
        ja 3f
        addsd xmm0, xmm1
    3:  dec rsi
        jnz 2b
        cvttsd2si rax, xmm0
        ret";
    avx_fma "vectors" 0.7 Data::Plain, "
        vpxor ymm0, ymm0, ymm0
        vpxor ymm1, ymm1, ymm1
        vpxor ymm2, ymm2, ymm2
        vpxor ymm3, ymm3, ymm3
        vpcmpeqd ymm4, ymm4, ymm4
        vpsrlq ymm5, ymm4, 54
        vpsllq ymm5, ymm5, 52
    2:  vfmadd231pd ymm0, ymm5, ymm5
        vfmadd231pd ymm1, ymm5, ymm5
        vfmadd231pd ymm2, ymm5, ymm5
        vfmadd231pd ymm3, ymm5, ymm5
        dec rsi
        jnz 2b
        vmovq rax, xmm0
        vzeroupper
        ret";
    avx_integer "vectors" 0.7 Data::Plain, "
        vpcmpeqd ymm4, ymm4, ymm4
        vpsrld ymm0, ymm4, 3
        vpsrld ymm1, ymm4, 7
    2:  vpaddd ymm0, ymm0, ymm1
        vpshufb ymm2, ymm0, ymm1
        vpxor ymm1, ymm1, ymm2
        vpsrlq ymm3, ymm1, 9
        vpor ymm1, ymm1, ymm3
        dec rsi
        jnz 2b
        vmovq rax, xmm1
        vzeroupper
        ret";
    sum "sequential" 0.5 Data::Plain, "
        xor eax, eax
    2:  xor ecx, ecx
    3:  add rax, [rdi + rcx*8]
        inc rcx
        cmp rcx, 2048
        jb 3b
        dec rsi
        jnz 2b
        ret";
    sum_unrolled "sequential" 0.5 Data::Plain, "
        xor eax, eax
    2:  mov rcx, rdi
        lea rdx, [rdi + 16384]
    3:  add rax, [rcx]
        add rax, [rcx + 8]
        add rax, [rcx + 16]
        add rax, [rcx + 24]
        add rcx, 32
        cmp rcx, rdx
        jb 3b
        dec rsi
        jnz 2b
        ret";
    fill "sequential" 0.5 Data::Plain, "
        xor eax, eax
    2:  xor ecx, ecx
    3:  mov [rdi + rcx*8], rsi
        inc rcx
        cmp rcx, 2048
        jb 3b
        dec rsi
        jnz 2b
        ret";
    copy "sequential" 0.5 Data::Plain, "
    2:  xor ecx, ecx
    3:  mov rax, [rdi + rcx*8]
        mov [rdi + rcx*8 + 16384], rax
        inc rcx
        cmp rcx, 2048
        jb 3b
        dec rsi
        jnz 2b
        ret";
    byte_hash "sequential" 0.5 Data::Plain, "
        mov eax, 5381
    2:  xor ecx, ecx
    3:  movzx edx, byte ptr [rdi + rcx]
        imul eax, eax, 33
        xor eax, edx
        inc rcx
        cmp rcx, 4096
        jb 3b
        dec rsi
        jnz 2b
        ret";
    avx_stream "sequential" 0.5 Data::Plain, "
        vpxor ymm0, ymm0, ymm0
    2:  xor ecx, ecx
    3:  vpaddd ymm0, ymm0, [rdi + rcx]
        vpaddd ymm0, ymm0, [rdi + rcx + 32]
        add rcx, 64
        cmp rcx, 16384
        jb 3b
        dec rsi
        jnz 2b
        vmovq rax, xmm0
        vzeroupper
        ret";
    stack "sequential" 0.5 Data::Plain, "
        xor eax, eax
    2:  push rax
        push rsi
        push rdi
        pop rdi
        pop rsi
        pop rax
        add rax, rsi
        dec rsi
        jnz 2b
        ret";
    frame_across_pages "across pages" 0.1 Data::Plain, "
        mov rax, rsp
        xor r8d, r8d
        lea rsp, [rdi + 32776]
    2:  push rsi
        push rax
        pop rdx
        pop rcx
        add r8, rcx
        dec rsi
        jnz 2b
        mov rsp, rax
        mov rax, r8
        ret";
    chase_l1 "dependent, L1" 0.35 Data::Ring(16 << 10), "
        xor eax, eax
    2:  mov rax, [rdi + rax]
        dec rsi
        jnz 2b
        ret";
    chase_l2 "dependent, beyond" 0.6 Data::Ring(512 << 10), "
        xor eax, eax
    2:  mov rax, [rdi + rax]
        dec rsi
        jnz 2b
        ret";
    chase_memory "dependent, beyond" 0.6 Data::Ring(64 << 20), "
        xor eax, eax
    2:  mov rax, [rdi + rax]
        dec rsi
        jnz 2b
        ret";
    leaf_calls "calls" 0.3 Data::Plain, "
        xor eax, eax
    2:  call 3f
        call 4f
        dec rsi
        jnz 2b
        ret
    3:  lea rax, [rax + rsi]
        ret
    4:  xor rax, rsi
        ret";
    fibonacci "calls" 0.3 Data::Plain, "
        push rbx
        push rbp
        mov rbp, rsi
    2:  mov edi, 15
        call 3f
        dec rbp
        jnz 2b
        pop rbp
        pop rbx
        ret
    3:  cmp edi, 2
        jb 4f
        push rbx
        push rdi
        dec edi
        call 3b
        mov ebx, eax
        pop rdi
        sub edi, 2
        call 3b
        add eax, ebx
        pop rbx
        ret
    4:  mov eax, edi
        ret";
    one_target "indirect calls" 0.25 Data::Plain, "
        lea rdx, [rip + 3f]
        mov [rdi], rdx
        xor eax, eax
    2:  call [rdi]
        dec rsi
        jnz 2b
        ret
    3:  add rax, rsi
        ret";
    four_targets "indirect calls" 0.25 Data::Plain, "
        lea rdx, [rip + 3f]
        mov [rdi], rdx
        lea rdx, [rip + 4f]
        mov [rdi + 8], rdx
        lea rdx, [rip + 5f]
        mov [rdi + 16], rdx
        lea rdx, [rip + 6f]
        mov [rdi + 24], rdx
        xor eax, eax
    2:  mov ecx, esi
        and ecx, 3
        call [rdi + rcx*8]
        dec rsi
        jnz 2b
        ret
    3:  add rax, rsi
        ret
    4:  sub rax, rsi
        ret
    5:  xor rax, rsi
        ret
    6:  rol rax, 3
        ret";
}
