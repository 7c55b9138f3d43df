//! A guest instruction taken apart into the fields of its encoding, and put together again with
//! other operands (SDM 2, chapter 2).
//!
//! Guest and host speak the same language, so an instruction whose registers or memory operand
//! change needs no encoder that knows what it means: prefixes, opcode and immediate stay, the
//! register fields and the memory form are exchanged. Only legacy and VEX encodings are known here;
//! others are not offered to guests.

use super::asm::{Asm, Mem, Reg, copy_short};

/// The fields of one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Raw {
    pub(crate) lock: bool,
    pub(crate) operand_size: bool,
    /// `F2` or `F3`, or 0.
    pub(crate) repeat: u8,
    /// The REX prefix, or the same bits of a VEX prefix; 0 where there is none.
    pub(crate) rex: u8,
    pub(crate) vex: Option<Vex>,
    /// 0 for one-byte opcodes, 1 for `0F`, 2 for `0F 38`, 3 for `0F 3A`.
    pub(crate) map: u8,
    pub(crate) opcode: u8,
    pub(crate) modrm: Option<u8>,
    /// The immediate bytes.
    tail: [u8; 15],
    tail_len: u8,
}

/// What a VEX prefix holds besides the bits of REX.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vex {
    pub(crate) vvvv: u8,
    length: u8,
    prefix: u8,
}

/// The operands of the new instruction; `None` keeps the guest's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Operands {
    /// The `ModRM` `reg` field.
    pub(crate) reg: Option<u8>,
    /// The `ModRM` `rm` field.
    pub(crate) rm: Option<Rm>,
    /// The VEX `vvvv` field.
    pub(crate) vvvv: Option<u8>,
    /// The register in the low bits of the opcode.
    pub(crate) opcode_reg: Option<u8>,
    /// A byte register 4 to 7 is meant as SPL, BPL, SIL or DIL.
    pub(crate) needs_rex: bool,
}

/// A register or a place in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rm {
    Reg(Reg),
    Mem(Mem),
}

/// Whether an opcode of the one-byte map has a `ModRM` byte.
fn one_byte_has_modrm(opcode: u8) -> bool {
    match opcode {
        0x00..=0x3f => opcode & 7 < 4,
        0x62
        | 0x63
        | 0x69
        | 0x6b
        | 0x80..=0x8f
        | 0xc0
        | 0xc1
        | 0xc4..=0xc7
        | 0xd0..=0xd3
        | 0xd8..=0xdf
        | 0xf6
        | 0xf7
        | 0xfe
        | 0xff => true,
        _ => false,
    }
}

/// Whether an opcode of the `0F` map has a `ModRM` byte.
fn two_byte_has_modrm(opcode: u8) -> bool {
    !matches!(opcode,
        0x04..=0x0c | 0x0e | 0x30..=0x3f | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa
        | 0xc8..=0xcf)
}

/// Length of SIB and displacement behind a `ModRM` byte.
fn memory_form_length(modrm: u8, next: u8, address_size: u32) -> usize {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if mode == 3 {
        return 0;
    }
    if address_size == 16 {
        return match mode {
            0 if rm == 6 => 2,
            0 => 0,
            1 => 1,
            _ => 2,
        };
    }
    let sib = usize::from(rm == 4);
    let base = if rm == 4 { next & 7 } else { rm };
    sib + match mode {
        0 if base == 5 => 4,
        0 => 0,
        1 => 1,
        _ => 4,
    }
}

/// Whether a byte is a prefix in 64-bit code.
fn is_prefix(byte: u8) -> bool {
    matches!(
        byte,
        0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
    )
}

impl Raw {
    /// Takes apart `bytes`, exactly one valid instruction without EVEX, XOP or 3DNow!.
    pub(crate) fn parse(bytes: &[u8], bits: u32, is_vex: bool) -> Self {
        let mut raw = Self {
            lock: false,
            operand_size: false,
            repeat: 0,
            rex: 0,
            vex: None,
            map: 0,
            opcode: 0,
            modrm: None,
            tail: [0; 15],
            tail_len: 0,
        };
        let mut at = 0;
        let mut address_override = false;
        loop {
            match bytes[at] {
                0x66 => raw.operand_size = true,
                0x67 => address_override = true,
                0xf0 => raw.lock = true,
                0xf2 | 0xf3 => raw.repeat = bytes[at],
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                // A REX prefix counts only where the opcode follows at once.
                0x40..=0x4f if bits == 64 && is_prefix(bytes[at + 1]) => {}
                _ => break,
            }
            at += 1;
        }
        at = if is_vex {
            raw.parse_vex(bytes, at)
        } else {
            raw.parse_legacy(bytes, at, bits)
        };
        let has_modrm = match (raw.map, is_vex) {
            (0, _) => one_byte_has_modrm(raw.opcode),
            (1, false) => two_byte_has_modrm(raw.opcode),
            (1, true) => raw.opcode != 0x77,
            _ => true,
        };
        if has_modrm {
            let modrm = bytes[at];
            raw.modrm = Some(modrm);
            let address_size = match (bits, address_override) {
                (64, false) => 64,
                (32, false) | (16 | 64, true) => 32,
                _ => 16,
            };
            let next = bytes.get(at + 1).copied().unwrap_or(0);
            at += 1 + memory_form_length(modrm, next, address_size);
        }
        let tail = &bytes[at..];
        copy_short(&mut raw.tail[..tail.len()], tail);
        raw.tail_len = tail.len() as u8;
        raw
    }

    fn parse_legacy(&mut self, bytes: &[u8], mut at: usize, bits: u32) -> usize {
        if bits == 64 && bytes[at] & 0xf0 == 0x40 {
            self.rex = bytes[at];
            at += 1;
        }
        if bytes[at] == 0x0f {
            at += 1;
            self.map = match bytes[at] {
                0x38 => 2,
                0x3a => 3,
                _ => 1,
            };
            at += usize::from(self.map > 1);
        }
        self.opcode = bytes[at];
        at + 1
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize) -> usize {
        let (first, last, opcode) = if bytes[at] == 0xc5 {
            self.map = 1;
            (bytes[at + 1], bytes[at + 1] & 0x7f, at + 2)
        } else {
            self.map = bytes[at + 1] & 0x1f;
            (bytes[at + 1], bytes[at + 2], at + 3)
        };
        let r = (!first >> 7 & 1) << 2;
        let xb = if bytes[at] == 0xc5 {
            0
        } else {
            !first >> 5 & 3
        };
        self.rex = 0x40 | (last >> 7) << 3 | r | xb;
        self.vex = Some(Vex {
            vvvv: !last >> 3 & 15,
            length: last & 4,
            prefix: last & 3,
        });
        self.opcode = bytes[opcode];
        opcode + 1
    }

    /// The register in the `ModRM` `reg` field.
    pub(crate) fn reg(&self) -> u8 {
        self.modrm.unwrap_or(0) >> 3 & 7 | (self.rex & 4) << 1
    }

    /// The register in the `ModRM` `rm` field.
    pub(crate) fn rm(&self) -> u8 {
        self.modrm.unwrap_or(0) & 7 | (self.rex & 1) << 3
    }

    /// The register in the low bits of the opcode.
    pub(crate) fn opcode_reg(&self) -> u8 {
        self.opcode & 7 | (self.rex & 1) << 3
    }

    /// The immediate bytes.
    pub(crate) fn immediate(&self) -> &[u8] {
        &self.tail[..usize::from(self.tail_len)]
    }

    /// Puts the instruction together with other operands.
    pub(crate) fn emit(&self, asm: &mut Asm, operands: Operands) {
        let reg = operands.reg.unwrap_or(self.reg());
        // The short INC and DEC of 32-bit code have become forms with a `ModRM` byte.
        let short = operands.opcode_reg.map(|r| Rm::Reg(Reg(r)));
        let rm = operands.rm.or(short).unwrap_or(Rm::Reg(Reg(self.rm())));
        let opcode_reg = operands.opcode_reg.unwrap_or(self.opcode_reg());
        let mut rex = self.rex & 0x48;
        if self.modrm.is_some() {
            rex |= (reg >> 3) << 2;
            rex |= match rm {
                Rm::Reg(r) => r.0 >> 3,
                Rm::Mem(m) => Asm::rex_mem(m),
            };
        } else {
            rex |= opcode_reg >> 3;
        }
        if rex & 0xf != 0 || operands.needs_rex {
            rex |= 0x40;
        }
        if let Some(vex) = self.vex {
            self.emit_vex(asm, vex, rex, operands.vvvv.unwrap_or(vex.vvvv));
        } else {
            self.emit_legacy(asm, rex, opcode_reg);
        }
        if self.modrm.is_some() {
            match rm {
                Rm::Reg(r) => asm.byte(0xc0 | (reg & 7) << 3 | (r.0 & 7)),
                Rm::Mem(m) => asm.modrm_mem(reg, m),
            }
        }
        asm.bytes(self.immediate());
    }

    fn emit_legacy(&self, asm: &mut Asm, rex: u8, opcode_reg: u8) {
        if self.lock {
            asm.byte(0xf0);
        }
        if self.operand_size {
            asm.byte(0x66);
        }
        if self.repeat != 0 {
            asm.byte(self.repeat);
        }
        if rex != 0 {
            asm.byte(rex);
        }
        match self.map {
            0 => {}
            1 => asm.byte(0x0f),
            2 => asm.bytes(&[0x0f, 0x38]),
            _ => asm.bytes(&[0x0f, 0x3a]),
        }
        if self.modrm.is_some() {
            asm.byte(self.opcode);
        } else {
            asm.byte(self.opcode & 0xf8 | opcode_reg & 7);
        }
    }

    fn emit_vex(&self, asm: &mut Asm, vex: Vex, rex: u8, vvvv: u8) {
        asm.bytes(&[
            0xc4,
            (!rex & 7) << 5 | self.map,
            (rex & 8) << 4 | (!vvvv & 15) << 3 | vex.length | vex.prefix,
            self.opcode,
        ]);
    }
}
