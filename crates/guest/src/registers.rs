//! x87, SSE and AVX registers across context switches: more threads than CPUs, each with values of
//! its own in all registers, which are looked at again after the thread has been off its CPU.

#![expect(unsafe_code, reason = "registers are set and read by assembly")]

use std::{
    arch::{asm, is_x86_feature_detected},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{cpus, random::Random};

pub(crate) fn run(milliseconds: u64) -> Result<()> {
    let threads = 3 * cpus() as u64 + 2;
    let end = Instant::now() + Duration::from_millis(milliseconds);
    let workers: Vec<_> = (0..threads)
        .map(|seed| thread::spawn(move || strain(seed, end)))
        .collect();
    let mut rounds = 0;
    for worker in workers {
        rounds += worker.join().ok().context("a thread panicked")??;
    }
    let widest = if is_x86_feature_detected!("avx") {
        "AVX"
    } else {
        "SSE"
    };
    println!("registers: {threads} threads, x87 and {widest} kept in {rounds} switches");
    Ok(())
}

/// Sixteen registers of 32 bytes.
type Vectors = [[u64; 4]; 16];

fn strain(seed: u64, end: Instant) -> Result<u64> {
    let mut random = Random::new(seed);
    let avx = is_x86_feature_detected!("avx");
    let mut rounds = 0;
    while Instant::now() < end {
        let mut vectors: Vectors = [[0; 4]; 16];
        vectors.as_flattened_mut().fill_with(|| random.next());
        let number = random.below(1 << 62) as i64;
        let mut seen: Vectors = [[0; 4]; 16];
        let mut x87 = 0_i64;
        // SAFETY: the arrays have the size that the assembly reads and writes.
        unsafe {
            if avx {
                through_avx(&vectors, &mut seen, number, &mut x87);
            } else {
                through_sse(&vectors, &mut seen, number, &mut x87);
                for (seen, vector) in seen.iter_mut().zip(&vectors) {
                    seen[2..].copy_from_slice(&vector[2..]);
                }
            }
        }
        ensure!(
            seen == vectors,
            "vectors of thread {seed} changed in round {rounds}"
        );
        ensure!(
            x87 == number,
            "x87 of thread {seed}: {x87} instead of {number}"
        );
        rounds += 1;
    }
    Ok(rounds)
}

/// Loads all registers, gives the CPU away a few times, and stores them.
macro_rules! through {
    ($name:ident, $move:literal, $register:literal) => {
        unsafe fn $name(from: &Vectors, to: &mut Vectors, number: i64, x87: &mut i64) {
            // SAFETY: `from` and `to` hold 16 times 32 bytes; system calls touch no register but
            // RAX, RCX and R11; all that is changed is declared.
            unsafe {
                asm!(
                    "fild qword ptr [{number}]",
                    concat!($move, " ", $register, "0, [{from}]"),
                    concat!($move, " ", $register, "1, [{from} + 32]"),
                    concat!($move, " ", $register, "2, [{from} + 64]"),
                    concat!($move, " ", $register, "3, [{from} + 96]"),
                    concat!($move, " ", $register, "4, [{from} + 128]"),
                    concat!($move, " ", $register, "5, [{from} + 160]"),
                    concat!($move, " ", $register, "6, [{from} + 192]"),
                    concat!($move, " ", $register, "7, [{from} + 224]"),
                    concat!($move, " ", $register, "8, [{from} + 256]"),
                    concat!($move, " ", $register, "9, [{from} + 288]"),
                    concat!($move, " ", $register, "10, [{from} + 320]"),
                    concat!($move, " ", $register, "11, [{from} + 352]"),
                    concat!($move, " ", $register, "12, [{from} + 384]"),
                    concat!($move, " ", $register, "13, [{from} + 416]"),
                    concat!($move, " ", $register, "14, [{from} + 448]"),
                    concat!($move, " ", $register, "15, [{from} + 480]"),
                    "2:",
                    "mov eax, 24", // sched_yield
                    "syscall",
                    "sub {count:e}, 1",
                    "jnz 2b",
                    concat!($move, " [{to}], ", $register, "0"),
                    concat!($move, " [{to} + 32], ", $register, "1"),
                    concat!($move, " [{to} + 64], ", $register, "2"),
                    concat!($move, " [{to} + 96], ", $register, "3"),
                    concat!($move, " [{to} + 128], ", $register, "4"),
                    concat!($move, " [{to} + 160], ", $register, "5"),
                    concat!($move, " [{to} + 192], ", $register, "6"),
                    concat!($move, " [{to} + 224], ", $register, "7"),
                    concat!($move, " [{to} + 256], ", $register, "8"),
                    concat!($move, " [{to} + 288], ", $register, "9"),
                    concat!($move, " [{to} + 320], ", $register, "10"),
                    concat!($move, " [{to} + 352], ", $register, "11"),
                    concat!($move, " [{to} + 384], ", $register, "12"),
                    concat!($move, " [{to} + 416], ", $register, "13"),
                    concat!($move, " [{to} + 448], ", $register, "14"),
                    concat!($move, " [{to} + 480], ", $register, "15"),
                    "fistp qword ptr [{x87}]",
                    number = in(reg) &raw const number,
                    from = in(reg) from.as_ptr(),
                    to = in(reg) to.as_mut_ptr(),
                    x87 = in(reg) x87,
                    count = inout(reg) 3_u32 => _,
                    out("rax") _, out("rcx") _, out("r11") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                );
            }
        }
    };
}

through!(through_avx, "vmovdqu", "ymm");
through!(through_sse, "movdqu", "xmm");
