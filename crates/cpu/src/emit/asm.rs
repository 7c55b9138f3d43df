//! An assembler for the translator's own sequences (SDM 2, chapter 2).
//!
//! It knows only what those sequences need. Code is collected in a buffer whose final address is
//! known beforehand, so that jumps to fixed places can be encoded at once.

/// A host general register by its number in the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(pub(crate) u8);

#[expect(dead_code, reason = "the register file is listed as a whole")]
impl Reg {
    pub(crate) const RAX: Self = Self(0);
    pub(crate) const RCX: Self = Self(1);
    pub(crate) const RDX: Self = Self(2);
    pub(crate) const RBX: Self = Self(3);
    pub(crate) const RSP: Self = Self(4);
    pub(crate) const RBP: Self = Self(5);
    pub(crate) const RSI: Self = Self(6);
    pub(crate) const RDI: Self = Self(7);
    pub(crate) const R8: Self = Self(8);
    pub(crate) const R9: Self = Self(9);
    pub(crate) const R10: Self = Self(10);
    pub(crate) const R11: Self = Self(11);
    pub(crate) const R12: Self = Self(12);
    pub(crate) const R13: Self = Self(13);
    pub(crate) const R14: Self = Self(14);
    pub(crate) const R15: Self = Self(15);
}

/// A memory operand of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mem {
    pub(crate) base: Option<Reg>,
    /// Register and log2 of its scale.
    pub(crate) index: Option<(Reg, u8)>,
    pub(crate) disp: i32,
}

impl Mem {
    pub(crate) const fn base(base: Reg, disp: i32) -> Self {
        Self {
            base: Some(base),
            index: None,
            disp,
        }
    }

    pub(crate) const fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Self {
        Self {
            base: Some(base),
            index: Some((index, scale)),
            disp,
        }
    }
}

/// Condition codes as the encoding numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    dead_code,
    reason = "the condition codes are listed as far as readers expect them"
)]
pub(crate) enum Cond {
    O = 0,
    B = 2,
    Ae = 3,
    E = 4,
    Ne = 5,
    A = 7,
    S = 8,
}

/// Operand width of an instruction of the assembler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    B8,
    B16,
    B32,
    B64,
}

impl Width {
    pub(crate) fn of_bytes(bytes: u32) -> Self {
        match bytes {
            1 => Self::B8,
            2 => Self::B16,
            4 => Self::B32,
            _ => Self::B64,
        }
    }
}

/// A jump whose target is not known yet.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) enum Fixup {
    Rel8(usize),
    Rel32(usize),
}

impl Fixup {
    /// Where its displacement lies in the code.
    pub(crate) fn offset(self) -> usize {
        match self {
            Self::Rel8(at) | Self::Rel32(at) => at,
        }
    }
}

/// Where an opcode lives: the escape bytes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    One = 0,
    Of = 1,
    Of38 = 2,
}

/// Copies bytes, few as a rule, without a call for so little.
#[inline]
pub(crate) fn copy_short(to: &mut [u8], from: &[u8]) {
    /// Both ends, which overlap or meet.
    fn ends<const N: usize>(to: &mut [u8], from: &[u8]) {
        let last = from.len() - N;
        to[..N].copy_from_slice(&from[..N]);
        to[last..last + N].copy_from_slice(&from[last..]);
    }
    match from.len() {
        0 => {}
        1 => to[0] = from[0],
        2..4 => ends::<2>(to, from),
        4..8 => ends::<4>(to, from),
        8..=16 => ends::<8>(to, from),
        _ => to.copy_from_slice(from),
    }
}

/// How the host branches best on a register without its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branches {
    /// By `JRCXZ`, which is taken where all is well.
    Jrcxz,
    /// By `LOOP`, which isn't, and costs AMD's CPUs no more than any other branch (and Intel's some six
    /// cycles).
    Loop,
}

impl Branches {
    /// What is better here.
    pub fn of_host() -> Self {
        static HOST: std::sync::OnceLock<Branches> = std::sync::OnceLock::new();
        *HOST.get_or_init(|| {
            let vendor = std::arch::x86_64::__cpuid(0);
            let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
            match name.each_ref() {
                [b"Auth", b"enti", b"cAMD"] | [b"Hygo", b"nGen", b"uine"] => Self::Loop,
                _ => Self::Jrcxz,
            }
        })
    }
}

/// Bytes of code that the buffer takes: a power of two, and more than the longest block has.
pub(crate) const SPACE: usize = 64 * 1024;
/// More than is ever written at once.
const SLACK: usize = 64;

/// The code buffer.
#[derive(Debug)]
pub(crate) struct Asm {
    /// The buffer; what is beyond `used` means nothing.
    code: Box<[u8; SPACE + SLACK]>,
    used: usize,
    /// The address at which `code[0]` will run.
    base: u64,
    pub(crate) branches: Branches,
}

impl Default for Asm {
    fn default() -> Self {
        const { assert!(SPACE.is_power_of_two()) };
        let code = vec![0; SPACE + SLACK].into_boxed_slice();
        Self {
            code: code.try_into().expect("it was made this long"),
            used: 0,
            base: 0,
            branches: Branches::of_host(),
        }
    }
}

impl Asm {
    /// Starts afresh; the code will run at `base`.
    pub(crate) fn reset(&mut self, base: u64) {
        self.used = 0;
        self.base = base;
    }

    pub(crate) fn code(&self) -> &[u8] {
        assert!(self.used < SPACE, "a block of {} bytes", self.used);
        &self.code[..self.used]
    }

    /// Bytes emitted so far.
    pub(crate) fn here(&self) -> usize {
        self.used
    }

    #[inline]
    pub(crate) fn byte(&mut self, b: u8) {
        // Masked, which spares the check; `code` looks whether it was ever too much.
        self.code[self.used & (SPACE - 1)] = b;
        self.used += 1;
    }

    #[inline]
    pub(crate) fn bytes(&mut self, b: &[u8]) {
        let at = self.used & (SPACE - 1);
        copy_short(&mut self.code[at..at + b.len()], b);
        self.used += b.len();
    }

    fn imm32(&mut self, v: i32) {
        self.bytes(&v.to_le_bytes());
    }

    /// `ModRM`, SIB and displacement of a memory operand.
    pub(crate) fn modrm_mem(&mut self, reg: u8, m: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = m.base else {
            let (index, scale) = m.index.map_or((4, 0), |(r, s)| (r.0 & 7, s));
            self.bytes(&[reg | 4, scale << 6 | index << 3 | 5]);
            self.imm32(m.disp);
            return;
        };
        let b = base.0 & 7;
        let mode = if m.disp == 0 && b != 5 {
            0x00
        } else if i8::try_from(m.disp).is_ok() {
            0x40
        } else {
            0x80
        };
        match m.index {
            Some((index, scale)) => {
                self.bytes(&[mode | reg | 4, scale << 6 | (index.0 & 7) << 3 | b]);
            }
            None if b == 4 => self.bytes(&[mode | reg | 4, 0x24]),
            None => self.byte(mode | reg | b),
        }
        match mode {
            0x00 => {}
            0x40 => self.byte(m.disp as u8),
            _ => self.imm32(m.disp),
        }
    }

    /// The X and B bits (already in REX position) of a memory operand.
    pub(crate) fn rex_mem(m: Mem) -> u8 {
        let x = m.index.map_or(0, |(r, _)| r.0 >> 3);
        let b = m.base.map_or(0, |r| r.0 >> 3);
        x << 1 | b
    }

    fn escape(&mut self, map: Map) {
        match map {
            Map::One => {}
            Map::Of => self.byte(0x0f),
            Map::Of38 => self.bytes(&[0x0f, 0x38]),
        }
    }

    fn prefixes(&mut self, width: Width, rex: u8, force: bool) {
        if width == Width::B16 {
            self.byte(0x66);
        }
        let w = if width == Width::B64 { 8 } else { 0 };
        if rex | w != 0 || force {
            self.byte(0x40 | rex | w);
        }
    }

    /// `opcode reg, [m]` or `opcode [m], reg`.
    pub(crate) fn op_mem(&mut self, width: Width, map: Map, opcode: u8, reg: u8, m: Mem) {
        let rex = (reg >> 3) << 2 | Self::rex_mem(m);
        self.prefixes(width, rex, width == Width::B8 && reg >= 4);
        self.escape(map);
        self.byte(opcode);
        self.modrm_mem(reg, m);
    }

    /// `opcode reg, rm` with a register as `rm`.
    pub(crate) fn op_reg(&mut self, width: Width, map: Map, opcode: u8, reg: u8, rm: Reg) {
        let rex = (reg >> 3) << 2 | rm.0 >> 3;
        self.prefixes(width, rex, width == Width::B8 && (reg >= 4 || rm.0 >= 4));
        self.escape(map);
        self.byte(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | (rm.0 & 7));
    }

    fn opcode_for(width: Width, wide: u8) -> u8 {
        if width == Width::B8 { wide - 1 } else { wide }
    }

    /// `mov reg, [m]`; 32-bit loads clear the upper half, narrower ones keep the rest.
    pub(crate) fn load(&mut self, width: Width, reg: Reg, m: Mem) {
        self.op_mem(width, Map::One, Self::opcode_for(width, 0x8b), reg.0, m);
    }

    /// `mov [m], reg`.
    pub(crate) fn store(&mut self, width: Width, m: Mem, reg: Reg) {
        self.op_mem(width, Map::One, Self::opcode_for(width, 0x89), reg.0, m);
    }

    /// `movzx reg, [m]` for 8 and 16 bits, `mov` for 32 and 64.
    pub(crate) fn load_zero_extended(&mut self, width: Width, reg: Reg, m: Mem) {
        match width {
            Width::B8 => self.op_mem(Width::B32, Map::Of, 0xb6, reg.0, m),
            Width::B16 => self.op_mem(Width::B32, Map::Of, 0xb7, reg.0, m),
            Width::B32 | Width::B64 => self.load(width, reg, m),
        }
    }

    /// `mov dst, src`.
    pub(crate) fn mov(&mut self, width: Width, dst: Reg, src: Reg) {
        self.op_reg(width, Map::One, Self::opcode_for(width, 0x89), src.0, dst);
    }

    /// `mov [m], imm32` (sign-extended for 64 bits).
    pub(crate) fn store_imm(&mut self, width: Width, m: Mem, imm: i32) {
        self.op_mem(width, Map::One, Self::opcode_for(width, 0xc7), 0, m);
        match width {
            Width::B8 => self.byte(imm as u8),
            Width::B16 => self.bytes(&(imm as u16).to_le_bytes()),
            Width::B32 | Width::B64 => self.imm32(imm),
        }
    }

    /// `add`, `sub` and the like, by the opcode for registers as wide as a word: `op dst, src`.
    pub(crate) fn alu(&mut self, width: Width, opcode: u8, dst: Reg, src: Reg) {
        self.op_reg(width, Map::One, Self::opcode_for(width, opcode), src.0, dst);
    }

    /// `neg reg`.
    pub(crate) fn negate(&mut self, width: Width, reg: Reg) {
        self.op_reg(width, Map::One, Self::opcode_for(width, 0xf7), 3, reg);
    }

    /// The shortest `mov reg, imm`.
    pub(crate) fn mov_imm(&mut self, reg: Reg, value: u64) {
        if u32::try_from(value).is_ok() {
            self.prefixes(Width::B32, reg.0 >> 3, false);
            self.byte(0xb8 | (reg.0 & 7));
            self.imm32(value as i32);
        } else if i32::try_from(value as i64).is_ok() {
            self.op_reg(Width::B64, Map::One, 0xc7, 0, reg);
            self.imm32(value as i32);
        } else {
            self.prefixes(Width::B64, reg.0 >> 3, false);
            self.byte(0xb8 | (reg.0 & 7));
            self.bytes(&value.to_le_bytes());
        }
    }

    /// `lea reg, [m]`; with `B32` the result is truncated.
    pub(crate) fn lea(&mut self, width: Width, reg: Reg, m: Mem) {
        self.op_mem(width, Map::One, 0x8d, reg.0, m);
    }

    /// `xchg a, b` (64 bits).
    pub(crate) fn xchg(&mut self, a: Reg, b: Reg) {
        self.op_reg(Width::B64, Map::One, 0x87, a.0, b);
    }

    /// `movzx dst, src` from 8 or 16 bits.
    pub(crate) fn movzx(&mut self, from: Width, dst: Reg, src: Reg) {
        let opcode = if from == Width::B8 { 0xb6 } else { 0xb7 };
        // A byte register number above 3 needs a REX prefix to be what it says.
        let rex = (dst.0 >> 3) << 2 | src.0 >> 3;
        self.prefixes(Width::B32, rex, from == Width::B8 && src.0 >= 4);
        self.bytes(&[0x0f, opcode, 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7)]);
    }

    fn vex(&mut self, map: Map, pp: u8, reg: u8, vvvv: u8, rm: Reg) {
        let r = (!reg >> 3 & 1) << 7;
        let b = (!rm.0 >> 3 & 1) << 5;
        self.bytes(&[
            0xc4,
            r | 0x40 | b | map as u8,
            0x80 | (!vvvv & 15) << 3 | pp,
        ]);
    }

    /// `shrx dst, src, count` (64 bits): no flags.
    pub(crate) fn shrx(&mut self, dst: Reg, src: Reg, count: Reg) {
        self.vex(Map::Of38, 3, dst.0, count.0, src);
        self.bytes(&[0xf7, 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7)]);
    }

    /// `shlx dst, src, count` (64 bits): no flags.
    pub(crate) fn shlx(&mut self, dst: Reg, src: Reg, count: Reg) {
        self.vex(Map::Of38, 1, dst.0, count.0, src);
        self.bytes(&[0xf7, 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7)]);
    }

    /// `sarx dst, src, count` (64 bits): no flags.
    pub(crate) fn sarx(&mut self, dst: Reg, src: Reg, count: Reg) {
        self.vex(Map::Of38, 2, dst.0, count.0, src);
        self.bytes(&[0xf7, 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7)]);
    }

    /// `bextr dst, src, control` (64 bits).
    pub(crate) fn bextr(&mut self, dst: Reg, src: Reg, control: Reg) {
        self.vex(Map::Of38, 0, dst.0, control.0, src);
        self.bytes(&[0xf7, 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7)]);
    }

    /// `rorx dst, src, count` (32 bits): no flags.
    pub(crate) fn rorx32(&mut self, dst: Reg, src: Reg, count: u8) {
        let r = (!dst.0 >> 3 & 1) << 7;
        let b = (!src.0 >> 3 & 1) << 5;
        let modrm = 0xc0 | (dst.0 & 7) << 3 | (src.0 & 7);
        self.bytes(&[0xc4, r | 0x40 | b | 3, 0x7b, 0xf0, modrm, count]);
    }

    /// `pext dst, src, mask` (64 bits): no flags.
    pub(crate) fn pext(&mut self, dst: Reg, src: Reg, mask: Reg) {
        self.vex(Map::Of38, 2, dst.0, src.0, mask);
        self.bytes(&[0xf5, 0xc0 | (dst.0 & 7) << 3 | (mask.0 & 7)]);
    }

    /// `pext dst, src, [mask]` (64 bits): no flags.
    pub(crate) fn pext_mem(&mut self, dst: Reg, src: Reg, mask: Mem) {
        self.bits_mem(2, dst, src, mask);
    }

    /// `pdep dst, src, [mask]` (64 bits): no flags.
    pub(crate) fn pdep_mem(&mut self, dst: Reg, src: Reg, mask: Mem) {
        self.bits_mem(3, dst, src, mask);
    }

    fn bits_mem(&mut self, pp: u8, dst: Reg, src: Reg, mask: Mem) {
        let r = (!dst.0 >> 3 & 1) << 7;
        let xb = !Self::rex_mem(mask) & 3;
        self.bytes(&[
            0xc4,
            r | xb << 5 | Map::Of38 as u8,
            0x80 | (!src.0 & 15) << 3 | pp,
            0xf5,
        ]);
        self.modrm_mem(dst.0, mask);
    }

    /// `add reg, [m]`.
    pub(crate) fn add_mem(&mut self, width: Width, reg: Reg, m: Mem) {
        self.op_mem(width, Map::One, 0x03, reg.0, m);
    }

    /// `not reg` (64 bits): no flags.
    pub(crate) fn not(&mut self, reg: Reg) {
        self.op_reg(Width::B64, Map::One, 0xf7, 2, reg);
    }

    /// `cmp dword [m], imm8`.
    pub(crate) fn cmp_mem_imm8(&mut self, m: Mem, imm: i8) {
        self.op_mem(Width::B32, Map::One, 0x83, 7, m);
        self.byte(imm as u8);
    }

    /// A repeated string instruction, given by its wide opcode.
    pub(crate) fn string(&mut self, wide: u8, width: Width) {
        self.byte(0xf3);
        self.prefixes(width, 0, false);
        self.byte(Self::opcode_for(width, wide));
    }

    /// `sub reg, [m]` (64 bits).
    pub(crate) fn sub_mem(&mut self, reg: Reg, m: Mem) {
        self.op_mem(Width::B64, Map::One, 0x2b, reg.0, m);
    }

    /// `cmp reg, [m]` (64 bits).
    pub(crate) fn cmp_with_mem(&mut self, reg: Reg, m: Mem) {
        self.op_mem(Width::B64, Map::One, 0x3b, reg.0, m);
    }

    /// `setc byte [m]`.
    pub(crate) fn setc(&mut self, m: Mem) {
        self.op_mem(Width::B32, Map::Of, 0x92, 0, m);
    }

    /// `dec dword [m]`.
    pub(crate) fn dec_mem(&mut self, m: Mem) {
        self.op_mem(Width::B32, Map::One, 0xff, 1, m);
    }

    /// `and reg, imm32` (64 bits).
    pub(crate) fn and_imm(&mut self, reg: Reg, imm: i32) {
        self.op_reg(Width::B64, Map::One, 0x81, 4, reg);
        self.imm32(imm);
    }

    /// A conditional jump to a fixed place in the code cache.
    pub(crate) fn jcc_to(&mut self, cond: u8, target: u64) {
        self.bytes(&[0x0f, 0x80 | cond]);
        self.rel_to(target);
    }

    /// The address of what is emitted next.
    pub(crate) fn address(&self) -> u64 {
        self.base + self.used as u64
    }

    /// `jmp` to a fixed place in the code cache.
    pub(crate) fn jmp_to(&mut self, target: u64) {
        self.byte(0xe9);
        self.rel_to(target);
    }

    fn rel_to(&mut self, target: u64) {
        let next = self.base + self.used as u64 + 4;
        self.imm32(target.wrapping_sub(next) as i32);
    }

    /// `jmp [m]`.
    pub(crate) fn jmp_mem(&mut self, m: Mem) {
        self.op_mem(Width::B32, Map::One, 0xff, 4, m);
    }

    /// `push [m]` (64 bits); the address is that before the push.
    pub(crate) fn push_mem(&mut self, m: Mem) {
        self.op_mem(Width::B32, Map::One, 0xff, 6, m);
    }

    pub(crate) fn ret(&mut self) {
        self.byte(0xc3);
    }

    pub(crate) fn call(&mut self) -> Fixup {
        self.byte(0xe8);
        self.hole32()
    }

    /// Goes on if this address is zero, else takes the jump, over less than 128 bytes. Uses `rcx`
    /// alone, no flags.
    pub(crate) fn unless_zero(&mut self, sum: Mem) -> Fixup {
        let rcx = Reg::RCX;
        if self.branches == Branches::Loop {
            let disp = sum.disp.wrapping_add(1);
            self.lea(Width::B64, rcx, Mem { disp, ..sum });
            return self.jump8(0xe2);
        }
        self.lea(Width::B64, rcx, sum);
        let zero = self.jrcxz();
        let other = self.jump8(0xeb);
        self.bind(zero);
        other
    }

    pub(crate) fn jmp(&mut self) -> Fixup {
        self.byte(0xe9);
        self.hole32()
    }

    pub(crate) fn jcc(&mut self, cond: u8) -> Fixup {
        self.bytes(&[0x0f, 0x80 | cond]);
        self.hole32()
    }

    /// `jrcxz` over less than 128 bytes: no flags.
    pub(crate) fn jrcxz(&mut self) -> Fixup {
        self.bytes(&[0xe3, 0]);
        Fixup::Rel8(self.used - 1)
    }

    /// `loop`-like one-byte jumps with an 8-bit displacement.
    pub(crate) fn jump8(&mut self, opcode: u8) -> Fixup {
        self.bytes(&[opcode, 0]);
        Fixup::Rel8(self.used - 1)
    }

    fn hole32(&mut self) -> Fixup {
        self.imm32(0);
        Fixup::Rel32(self.used - 4)
    }

    /// Lets a jump lead here.
    pub(crate) fn bind(&mut self, fixup: Fixup) {
        let here = self.used;
        match fixup {
            Fixup::Rel8(at) => {
                let distance = here - (at + 1);
                debug_assert!(distance < 128, "a short jump over {distance} bytes");
                self.code[at] = distance as u8;
            }
            Fixup::Rel32(at) => {
                let distance = (here - (at + 4)) as i32;
                self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

    fn text(emit: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::default();
        emit(&mut asm);
        let mut decoder = Decoder::with_ip(64, asm.code(), 0, DecoderOptions::NONE);
        let mut out = String::new();
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if !out.is_empty() {
                out.push_str("; ");
            }
            GasFormatter::new().format(&instruction, &mut out);
        }
        out
    }

    #[test]
    fn encodes_what_it_says() {
        let t0 = Reg::R11;
        let t1 = Reg::R15;
        assert_eq!(
            text(|a| a.bextr(t1, Reg::RAX, Reg::RSP)),
            "bextr %rsp,%rax,%r15"
        );
        assert_eq!(
            text(|a| a.shrx(Reg::RCX, t0, Reg::RSP)),
            "shrx %rsp,%r11,%rcx"
        );
        assert_eq!(
            text(|a| a.pext_mem(t1, t0, Mem::base(Reg::RSP, 8))),
            "pext 8(%rsp),%r11,%r15"
        );
        assert_eq!(text(|a| a.pext(t1, t0, t1)), "pext %r15,%r11,%r15");
        assert_eq!(
            text(|a| a.lea(Width::B64, t0, Mem::indexed(Reg::R13, Reg::R12, 2, 0))),
            "lea (%r13,%r12,4),%r11"
        );
        assert_eq!(
            text(|a| a.store(Width::B8, Mem::base(Reg::R12, 0), Reg::RSI)),
            "mov %sil,(%r12)"
        );
        assert_eq!(
            text(|a| a.mov_imm(t0, 0xffff_ffff_8000_0000)),
            "mov $0xFFFFFFFF80000000,%r11"
        );
        assert_eq!(
            text(|a| a.add_mem(Width::B64, Reg::RCX, Mem::indexed(Reg::RSP, t1, 3, 0x1000))),
            "add 0x1000(%rsp,%r15,8),%rcx"
        );
        assert_eq!(text(|a| a.movzx(Width::B8, t1, t1)), "movzbl %r15b,%r15d");
        assert_eq!(
            text(|a| a.rorx32(t0, Reg::RCX, 21)),
            "rorx $0x15,%ecx,%r11d"
        );
        assert_eq!(
            text(|a| a.pdep_mem(t1, t0, Mem::base(Reg::RSP, 8))),
            "pdep 8(%rsp),%r11,%r15"
        );
    }
}
