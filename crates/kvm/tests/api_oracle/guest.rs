//! Little guests: a few snippets one after the other, in one of three modes.
//!
//! ```text
//!   0x0000  real mode's vectors      0x1000  a stub for each vector: mov al, n; out 0xe0, al; hlt
//!   0x3000  GDT                      0x4000  code
//!   0x8000  the stack's top          0xb000  IDT
//!   0x10000 page tables: 8 MiB one to one, and the APICs' pages
//!   0x20000 data
//! ```

use fastrand::Rng;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::draw::Draw;
use crate::side::Side;

pub(crate) const CODE: u64 = 0x4000;
const STUBS: u64 = 0x1000;
const GDT: u64 = 0x3000;
const IDT: u64 = 0xb000;
const STACK: u64 = 0x8000;
pub(crate) const TABLES: u64 = 0x1_0000;
const VECTORS: u64 = 256;

/// How the guest's CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Real,
    Protected,
    Long,
}

/// A guest.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) mode: Mode,
    pub(crate) code: Vec<u8>,
    pub(crate) rflags: u64,
    pub(crate) regs: [u64; 4],
}

fn imm(code: &mut Vec<u8>, opcode: u8, value: u32) {
    code.push(opcode);
    code.extend(value.to_le_bytes());
}

const EAX: u8 = 0xb8;
const ECX: u8 = 0xb9;
const EDX: u8 = 0xba;
const ESI: u8 = 0xbe;
const EDI: u8 = 0xbf;

/// Where guests look: data, slots that come and go, devices, nothing.
fn address(random: &mut Rng) -> u32 {
    let page = random.pick(&[
        0x2_0000,
        0x2_1000,
        0x2_0ffc,
        0x8_0000,
        0x10_0000,
        0x10_1000,
        0x18_0000,
        0x20_0000,
        0x28_0000,
        0x30_0000,
        0x38_0000,
        0x40_0000,
        0x7f_f000,
        0x3000_0000,
    ]);
    page + random.pick(&[0, 4, 0x10, 0xff8])
}

fn device(random: &mut Rng) -> u32 {
    let register = random.pick(&[
        0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x100, 0x280, 0x300, 0x310, 0x320, 0x350, 0x3e0,
    ]);
    random.pick(&[
        0xfee0_0000 + register,
        0xfee0_0000 + register,
        0xfec0_0000,
        0xfec0_0010,
    ])
}

fn msr(random: &mut Rng) -> u32 {
    random.pick(&[
        0x1b,
        0x174,
        0x176,
        0x179,
        0x2ff,
        0xc000_0080,
        0xc000_0081,
        0xc000_0084,
        0xc000_0100,
        0xc000_0102,
        0x802,
        0x808,
        0x80b,
        0x830,
        0x838,
        0x1234,
    ])
}

fn port(random: &mut Rng) -> u32 {
    random.pick(&[
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x80, 0x500, 0x504, 0x510, 0xcf8, 0xe1,
    ])
}

#[expect(clippy::too_many_lines, reason = "a table")]
/// One snippet that 32-bit and 64-bit code share.
fn snippet(random: &mut Rng, code: &mut Vec<u8>) {
    match random.u64(..25) {
        0 => {
            imm(code, EAX, random.u32(..));
            code.extend([0x6b, 0xc0, 0x4d, 0x01, 0xc3, 0xd1, 0xc3]); // imul eax,eax,77; add ebx,eax; rol ebx
        }
        1..4 => {
            imm(code, EDI, address(random));
            code.extend(random.pick(&[
                &[0x89, 0x07][..],         // mov [rdi], eax
                &[0x88, 0x1f],             // mov [rdi], bl
                &[0xf0, 0xff, 0x07],       // lock inc dword [rdi]
                &[0x01, 0x1f],             // add [rdi], ebx
                &[0x66, 0x89, 0x47, 0x07], // mov [rdi+7], ax
            ]));
        }
        4..6 => {
            imm(code, EDI, address(random));
            code.extend(random.pick(&[
                &[0x8b, 0x07][..],         // mov eax, [rdi]
                &[0x0f, 0xb6, 0x5f, 0x03], // movzx ebx, byte [rdi+3]
                &[0x33, 0x1f],             // xor ebx, [rdi]
                &[0x3b, 0x07],             // cmp eax, [rdi]
            ]));
        }
        6 => {
            imm(code, EDI, address(random));
            imm(code, ECX, random.u32(..40));
            code.extend(random.pick(&[[0xf3, 0xab], [0xf3, 0xaa]])); // rep stos
        }
        7 => {
            imm(code, ESI, address(random));
            imm(code, EDI, address(random));
            imm(code, ECX, random.u32(..9));
            code.extend(random.pick(&[[0xf3, 0xa5], [0xf3, 0xa4]])); // rep movs
        }
        8 | 9 => {
            imm(code, EDX, port(random));
            imm(code, EAX, random.u32(..));
            code.extend(random.pick(&[&[0xee][..], &[0xee], &[0xef], &[0x66, 0xef]])); // out dx
        }
        10 | 11 => {
            imm(code, EDX, port(random));
            code.extend(random.pick(&[&[0xec][..], &[0xec], &[0xed], &[0x66, 0xed]])); // in dx
        }
        12 => {
            imm(code, EDX, random.pick(&[0x500, 0x510]));
            imm(code, ESI, random.pick(&[0x2_0000, 0x2_0ffe]));
            imm(code, EDI, 0x2_2000);
            // kvm.ko's emulator gives OUTS to the monitor one by one, ours all at once.
            imm(code, ECX, random.u32(..2));
            code.extend(random.pick(&[[0xf3, 0x6e], [0xf3, 0x6f], [0xf3, 0x6c]])); // rep outs, ins
        }
        13 => {
            imm(
                code,
                EAX,
                random.pick(&[0, 0x4000_0000, 0x4000_0001, 0x8000_0000, 0x8000_0008]),
            );
            code.extend([0x31, 0xc9, 0x0f, 0xa2]); // xor ecx, ecx; cpuid
        }
        14 => {
            imm(code, ECX, msr(random));
            code.extend([0x0f, 0x32]); // rdmsr
        }
        15 => {
            imm(code, ECX, msr(random));
            imm(
                code,
                EAX,
                random.pick(&[0, 1, 0x10, 0x30, 0xff, 0xd00, 0x2_0003, 0x0c_08fe]),
            );
            code.extend([0x31, 0xd2, 0x0f, 0x30]); // xor edx, edx; wrmsr
        }
        16 => code.extend(random.pick(&[
            &[0x0f, 0x20, 0xc0][..], // mov rax, cr0
            &[0x0f, 0x20, 0xd3],     // mov rbx, cr2
            &[0x0f, 0x20, 0xe0],     // mov rax, cr4
            &[0x0f, 0x21, 0xf3],     // mov rbx, dr6
            &[0x0f, 0x23, 0xc0],     // mov dr0, rax
        ])),
        17 => code.extend(random.pick(&[&[0xfb, 0x90][..], &[0xfa], &[0xfb, 0xf4], &[0xf4]])), // sti, cli, hlt
        18 => code.extend(random.pick(&[
            &[0xcc][..],
            &[0x0f, 0x0b],
            &[0xcd, 0x21],
            &[0x31, 0xc9, 0xf7, 0xf1],
        ])),
        19 | 20 => {
            imm(code, EDI, device(random));
            code.extend([0x8b, 0x07]);
        }
        21 | 22 => {
            imm(code, EDI, device(random));
            imm(
                code,
                EAX,
                random.pick(&[0, 1, 0x1ff, 0x40, 0x440f0, 0x40030, 0x1_0000, 0xff00_0000]),
            );
            code.extend([0x89, 0x07]);
        }
        23 => code.extend(random.pick(&[
            &[0x9c, 0x58][..],         // pushf; pop rax
            &[0x53, 0x53, 0x59],       // push rbx; push rbx; pop rcx
            &[0xe8, 0, 0, 0, 0, 0x59], // call +0; pop rcx
            &[0x0f, 0x01, 0xe0],       // smsw eax
        ])),
        _ => code.extend(random.pick(&[
            &[0x0f, 0x28, 0xc8, 0x66, 0x0f, 0xef, 0xd2][..], // movaps xmm1, xmm0; pxor xmm2, xmm2
            &[0x66, 0x0f, 0x6e, 0xc3],                       // movd xmm0, ebx
            &[0xdb, 0xe3, 0xd9, 0xe8],                       // fninit; fld1
        ])),
    }
}

fn real_snippet(random: &mut Rng, code: &mut Vec<u8>) {
    match random.u64(..6) {
        0 => code.extend([
            0xb0,
            random.u8(..),
            0xe6,
            random.pick(&[0x20, 0x21, 0xa1, 0xe1, 0x80]),
        ]),
        1 => code.extend([0xe4, random.pick(&[0x20, 0x21, 0xa0, 0x80])]),
        2 => code.extend([0xa3, 0x00, random.pick(&[0x90, 0xa0, 0xf0])]), // mov [n], ax
        3 => code.extend([0xcd, random.pick(&[0x10, 0x21, 3])]),
        4 => code.extend(random.pick(&[&[0xfb, 0x90][..], &[0xfa], &[0x9c, 0x58], &[0xfb, 0xf4]])),
        _ => code.extend([0xb9, random.u8(..20), 0, 0x01, 0xc8, 0xe2, 0xfc]), // mov cx; add ax,cx; loop
    }
}

impl Guest {
    pub(crate) fn random(random: &mut Rng) -> Guest {
        let mode = random.pick(&[
            Mode::Real,
            Mode::Protected,
            Mode::Long,
            Mode::Long,
            Mode::Long,
        ]);
        let mut code = Vec::new();
        for _ in 0..=random.u64(..6) {
            match mode {
                Mode::Real => real_snippet(random, &mut code),
                _ => snippet(random, &mut code),
            }
        }
        // out 0xe1, al; hlt
        code.extend([0xe6, 0xe1, 0xf4]);
        Guest {
            mode,
            code,
            rflags: random.pick(&[2, 2, 0x202, 0x246, 0x8d7]),
            regs: [
                random.u64(..),
                random.u64(..) & 0xffff_ffff,
                random.u64(..64),
                random.u64(..),
            ],
        }
    }

    /// Code and tables.
    pub(crate) fn write(&self, side: &Side) {
        for vector in 0..VECTORS {
            let stub = STUBS + 8 * vector;
            side.write(stub as usize, &[0xb0, vector as u8, 0xe6, 0xe0, 0xf4]);
            side.write(4 * vector as usize, &(stub as u32).to_le_bytes());
            let gate = 0x8e00_0008_0000 | stub;
            let size = if self.mode == Mode::Long { 16 } else { 8 };
            side.write((IDT + size * vector) as usize, &gate.to_le_bytes());
            if size == 16 {
                side.write((IDT + size * vector + 8) as usize, &[0; 8]);
            }
        }
        let code = if self.mode == Mode::Long {
            0x00af_9b00_0000_ffff
        } else {
            0x00cf_9b00_0000_ffff_u64
        };
        for (index, descriptor) in [0, code, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            side.write(GDT as usize + 8 * index, &u64::to_le_bytes(descriptor));
        }
        side.write(CODE as usize, &self.code);
    }

    pub(crate) fn registers(&self) -> kvm_regs {
        kvm_regs {
            rax: self.regs[0],
            rbx: self.regs[1],
            rcx: self.regs[2],
            r15: self.regs[3],
            rip: CODE,
            rsp: STACK,
            rflags: self.rflags,
            ..Default::default()
        }
    }

    /// The special registers; the APIC's base stays as it is.
    pub(crate) fn special(&self, now: &kvm_sregs) -> kvm_sregs {
        let mut sregs = kvm_sregs {
            apic_base: now.apic_base,
            tr: busy_tss(),
            ldt: no_ldt(),
            ..Default::default()
        };
        let (code, data, cr0) = match self.mode {
            Mode::Real => (
                segment(0, 0xb, 0xffff, 0, 0),
                segment(0, 3, 0xffff, 0, 0),
                0x10,
            ),
            Mode::Protected => (segment(8, 0xb, !0, 1, 0), segment(0x10, 3, !0, 1, 0), 0x33),
            Mode::Long => (
                segment(8, 0xb, !0, 0, 1),
                segment(0x10, 3, !0, 1, 0),
                0x8000_0033,
            ),
        };
        sregs.cs = code;
        [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [data; 5];
        sregs.cr0 = cr0;
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 23;
        sregs.idt.base = if self.mode == Mode::Real { 0 } else { IDT };
        sregs.idt.limit = 0xfff;
        if self.mode == Mode::Long {
            sregs.cr3 = TABLES;
            sregs.cr4 = 0x620;
            sregs.efer = 0xd01;
        }
        sregs
    }
}

fn segment(selector: u16, type_: u8, limit: u32, db: u8, l: u8) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit,
        db,
        l,
        g: u8::from(limit > 0xffff),
        present: 1,
        s: 1,
        ..Default::default()
    }
}

fn busy_tss() -> kvm_segment {
    kvm_segment {
        type_: 0xb,
        limit: 0xffff,
        present: 1,
        ..Default::default()
    }
}

fn no_ldt() -> kvm_segment {
    kvm_segment {
        type_: 2,
        limit: 0xffff,
        present: 1,
        ..Default::default()
    }
}

/// 8 MiB by 4 KiB pages, 0x30000000 and the APICs' pages by 2 MiB. Written once: whether a CPU walks
/// tables again that were changed behind its back is its own affair.
pub(crate) fn write_tables(side: &Side) {
    let entry = |table: u64, index: u64, value: u64| {
        side.write(
            (TABLES + 0x1000 * table + 8 * index) as usize,
            &value.to_le_bytes(),
        );
    };
    entry(0, 0, (TABLES + 0x1000) | 7);
    entry(1, 0, (TABLES + 0x2000) | 7);
    entry(1, 3, (TABLES + 0x3000) | 7);
    for directory in 0..4 {
        entry(2, directory, (TABLES + 0x4000 + 0x1000 * directory) | 7);
        for page in 0..512 {
            entry(4 + directory, page, ((512 * directory + page) << 12) | 7);
        }
    }
    entry(2, 0x3000_0000 >> 21, 0x3000_0000 | 0x87);
    for large in [0xfec0_0000u64, 0xfee0_0000] {
        entry(3, (large >> 21) & 511, large | 0x87);
    }
}
