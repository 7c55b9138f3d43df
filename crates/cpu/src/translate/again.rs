//! The flags of an instruction, worked out after it has run.
//!
//! Where nothing reads the arithmetic flags, a TLB check may destroy them; but a fault shows them to the
//! guest's handler. Many of the instructions that set them can be done again from what is left: the
//! operands of a comparison, the result of a logical operation, the sum and what was added. An
//! [`Again`] says how; the engine does it where somebody looks.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::rflags::{self, of_difference, of_result, of_sum};

use super::registers::{Home, home, number};
use super::{SCRATCH, T0};
use crate::emit::Asm;
use crate::emit::asm::Width;

/// A register of the guest, or a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Register(u8),
    Constant(u64),
}

/// What was done with the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// `left & right`, which need not have been kept.
    And,
    /// `left - right`, which was not kept.
    Compare,
    /// `left` is the difference, `right` what was subtracted.
    Subtract,
    /// `left` is the sum, `right` what was added.
    Add,
    /// The same with 1, and the carry is left alone.
    Increment,
    Decrement,
    /// `left` is the negated value.
    Negate,
}

/// How the flags of one instruction come about again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Again {
    done: Done,
    left: Value,
    right: Value,
    bits: u8,
    /// Where the carry is, if it is left alone.
    carry: Carry,
}

/// Where the carry is that was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carry {
    Host,
    Aside,
}

/// A register that holds what it held, until somebody writes it.
///
/// The stack pointer is not one: how far it has moved is not always in the register.
fn register(register: Register) -> Option<Value> {
    let plain = register.is_gpr() && !super::registers::is_high_byte(register);
    let guest = plain.then(|| number(register))?;
    (guest != number(Register::RSP)).then_some(Value::Register(guest))
}

impl Again {
    /// How to do this instruction's flags again from its operands and results alone.
    pub(super) fn of(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let done = match instruction.mnemonic() {
            M::And | M::Or | M::Xor | M::Test => Done::And,
            M::Cmp => Done::Compare,
            M::Sub => Done::Subtract,
            M::Add => Done::Add,
            M::Inc => Done::Increment,
            M::Dec => Done::Decrement,
            M::Neg => Done::Negate,
            _ => return None,
        };
        if instruction.op0_kind() != OpKind::Register || instruction.has_lock_prefix() {
            return None;
        }
        let left = register(instruction.op0_register())?;
        let right = match instruction.op1_kind() {
            _ if instruction.op_count() < 2 => Some(Value::Constant(1)),
            OpKind::Register => register(instruction.op1_register()),
            OpKind::Memory => None,
            _ => Some(Value::Constant(instruction.immediate(1))),
        };
        let again = |done, left, right| {
            let bits = instruction.op0_register().size() as u8 * 8;
            Some(Self {
                done,
                left,
                right,
                bits,
                carry: Carry::Host,
            })
        };
        match done {
            // The result is what counts, and it is there.
            Done::And if instruction.mnemonic() != M::Test => again(done, left, left),
            // Both are the result: nothing is left of what was subtracted, or of the highest bit of
            // what was added.
            Done::Subtract if right == Some(left) => {
                again(Done::Compare, Value::Constant(0), Value::Constant(0))
            }
            Done::Add if right == Some(left) => None,
            _ => again(done, left, right?),
        }
    }

    /// The same where the carry that it leaves alone has been put aside.
    pub(super) fn with_carry_aside(self) -> Self {
        Self {
            carry: Carry::Aside,
            ..self
        }
    }

    pub(super) fn has_carry_aside(&self) -> bool {
        self.carry == Carry::Aside
    }

    /// Whether it leaves the carry alone.
    pub(crate) fn keeps_carry(&self) -> bool {
        matches!(self.done, Done::Increment | Done::Decrement)
    }

    /// The registers that it is done from, a bit for each.
    pub(super) fn registers(&self) -> u16 {
        [self.left, self.right]
            .iter()
            .fold(0, |all, value| match value {
                Value::Register(guest) => all | 1 << guest,
                Value::Constant(_) => all,
            })
    }

    /// Does it again in the host's flags, for what does not leave the carry alone. Uses `rcx` and `T0`.
    pub(crate) fn emit(&self, asm: &mut Asm) {
        const ADD: u8 = 0x01;
        const AND: u8 = 0x21;
        const SUB: u8 = 0x29;
        const CMP: u8 = 0x39;
        let (left, right) = (SCRATCH, T0);
        for (value, reg) in [(self.left, left), (self.right, right)] {
            match value {
                Value::Constant(constant) => asm.mov_imm(reg, constant),
                Value::Register(guest) => match home(guest) {
                    Home::Host(from) => asm.mov(Width::B64, reg, from),
                    Home::Frame(m) => asm.load(Width::B64, reg, m),
                },
            }
        }
        let steps: &[u8] = match self.done {
            Done::And => &[AND],
            Done::Compare => &[CMP],
            Done::Subtract | Done::Decrement => &[ADD, SUB],
            Done::Add | Done::Increment => &[SUB, ADD],
            Done::Negate => &[],
        };
        let width = Width::of_bytes(u32::from(self.bits) / 8);
        if self.done == Done::Negate {
            asm.negate(width, left);
            asm.negate(width, left);
        }
        for opcode in steps {
            asm.alu(width, *opcode, left, right);
        }
    }

    /// The arithmetic flags, as RFLAGS has them, given the general registers, and the flags in the
    /// host's and those put aside, of one of which it may leave the carry alone.
    pub(crate) fn flags(&self, gpr: &[u64; 16], host: u64, aside: u64) -> u64 {
        let value = |value| match value {
            Value::Register(guest) => gpr[usize::from(guest)],
            Value::Constant(constant) => constant,
        };
        let (left, right) = (value(self.left), value(self.right));
        let bits = u32::from(self.bits);
        let flags = match self.done {
            Done::And => of_result(left & right, bits),
            Done::Compare => of_difference(left, right, bits),
            Done::Subtract | Done::Decrement => {
                of_difference(left.wrapping_add(right), right, bits)
            }
            Done::Add | Done::Increment => of_sum(left.wrapping_sub(right), right, bits),
            Done::Negate => of_difference(0, left.wrapping_neg(), bits),
        };
        if self.keeps_carry() {
            let before = match self.carry {
                Carry::Host => host,
                Carry::Aside => aside,
            };
            flags & !rflags::CF | before & rflags::CF
        } else {
            flags
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "asks the host by assembly")]
mod tests {
    use core::arch::asm;

    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    /// Numbers at the borders of each width.
    const VALUES: [u64; 12] = [
        0,
        1,
        0xf,
        0x10,
        0x7f,
        0x80,
        0xff,
        0x7fff_ffff,
        0x8000_0000,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        u64::MAX,
    ];

    /// Runs an instruction on the host; the arithmetic flags before and behind it, and rax and rbx
    /// behind it.
    macro_rules! native {
        ($text:literal) => {
            |rax: u64, rbx: u64, carry: u64| {
                let (mut rax, mut rbx, mut flags) = (rax, rbx, carry);
                // SAFETY: the instructions in the table below change these registers alone.
                unsafe {
                    asm!(
                        "xchg rbx, {rbx}",
                        "shr {flags}, 1",
                        $text,
                        "pushfq",
                        "pop {flags}",
                        "xchg rbx, {rbx}",
                        rbx = inout(reg) rbx,
                        flags = inout(reg) flags,
                        inout("rax") rax,
                    );
                }
                (rax, rbx, flags & rflags::ARITHMETIC)
            }
        };
    }

    type Native = fn(u64, u64, u64) -> (u64, u64, u64);

    #[test]
    fn flags_come_about_as_on_the_host() {
        let table: [(&[u8], Native); 18] = [
            (&[0x39, 0xd8], native!("cmp eax, ebx")),
            (&[0x48, 0x39, 0xd8], native!("cmp rax, rbx")),
            (&[0x66, 0x39, 0xd8], native!("cmp ax, bx")),
            (&[0x38, 0xd8], native!("cmp al, bl")),
            (&[0x48, 0x83, 0xf8, 0x80], native!("cmp rax, -128")),
            (&[0x85, 0xd8], native!("test eax, ebx")),
            (&[0xa8, 0x81], native!("test al, 0x81")),
            (&[0x48, 0x21, 0xd8], native!("and rax, rbx")),
            (&[0x66, 0x09, 0xd8], native!("or ax, bx")),
            (&[0x30, 0xd8], native!("xor al, bl")),
            (&[0x48, 0x01, 0xd8], native!("add rax, rbx")),
            (&[0x04, 0x7f], native!("add al, 0x7f")),
            (&[0x29, 0xd8], native!("sub eax, ebx")),
            (&[0x48, 0x29, 0xc0], native!("sub rax, rax")),
            (&[0x66, 0x2d, 0x00, 0x80], native!("sub ax, 0x8000")),
            (&[0xfe, 0xc0], native!("inc al")),
            (&[0x48, 0xff, 0xc8], native!("dec rax")),
            (&[0xf7, 0xd8], native!("neg eax")),
        ];
        for (code, native) in table {
            let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
            let again = Again::of(&instruction).unwrap();
            for (rax, rbx, carry) in all() {
                let (rax_behind, rbx_behind, flags) = native(rax, rbx, carry);
                let mut gpr = [0x5555_5555_5555_5555; 16];
                (gpr[0], gpr[3]) = (rax_behind, rbx_behind);
                let found = again.flags(&gpr, carry, 1 - carry);
                assert_eq!(found, flags, "{code:x?} on {rax:x}, {rbx:x}, {carry}");
                let other = again.with_carry_aside().flags(&gpr, 1 - carry, carry);
                assert_eq!(other, flags, "{code:x?} with the carry aside");
            }
        }
    }

    fn all() -> impl Iterator<Item = (u64, u64, u64)> {
        let pairs = VALUES
            .into_iter()
            .flat_map(|a| VALUES.into_iter().map(move |b| (a, b)));
        pairs.flat_map(|(a, b)| [(a, b, 0), (a, b, 1)])
    }

    #[test]
    fn what_is_lost_is_not_made_up() {
        let lost: [&[u8]; 7] = [
            &[0x3b, 0x03],       // cmp (%rbx),%eax
            &[0x03, 0x03],       // add (%rbx),%eax
            &[0x01, 0xc0],       // add %eax,%eax
            &[0xd1, 0xe0],       // shl %eax
            &[0x11, 0xd8],       // adc %ebx,%eax
            &[0x80, 0xfc, 0x05], // cmp $5,%ah
            &[0x48, 0x39, 0xe0], // cmp %rsp,%rax
        ];
        for code in lost {
            let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
            assert_eq!(Again::of(&instruction), None, "{code:x?}");
        }
    }
}
