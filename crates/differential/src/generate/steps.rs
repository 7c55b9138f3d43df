//! The items of a block, one after the other, before they have addresses.
//!
//! Each item's `ip` is its number; branches name numbers. The encoder turns them into addresses.

use fastrand::Rng;
use iced_x86::{
    Code, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpKind, Register,
};

use super::block::Forms;
use super::operands::{self, Choice};
use crate::case::Mode;
use crate::layout::{CODE, WINDOWS, WRITABLE_BYTES};

/// Draws that may fail before a step is given up.
const ATTEMPTS: usize = 20;
/// RSP as a bit among the general registers.
const RSP: u16 = 1 << 4;

pub(super) struct Builder<'a> {
    forms: &'a Forms,
    rng: &'a mut Rng,
    items: Vec<Instruction>,
    /// Registers that no item writes: the base of memory operands, the counter of loops.
    base: usize,
    counter: usize,
    choice: Choice,
    /// Calls whose subroutine is still to be written, by index.
    calls: Vec<usize>,
    info: InstructionInfoFactory,
}

impl<'a> Builder<'a> {
    pub(super) fn new(forms: &'a Forms, rng: &'a mut Rng) -> Self {
        // Registers that no instruction writes by itself.
        const LONG: [usize; 8] = [8, 9, 10, 11, 12, 13, 14, 15];
        let (base, counter) = if forms.mode == Mode::Long {
            let first = rng.usize(..8);
            (LONG[first], LONG[(first + 1 + rng.usize(..7)) % 8])
        } else {
            (3, 5)
        };
        let gprs = !(RSP | 1 << base | 1 << counter);
        let base_register = wide(forms.mode) + base as u32;
        Self {
            forms,
            rng,
            items: Vec::new(),
            base,
            counter,
            choice: Choice {
                gprs,
                base: Some(base_register),
            },
            calls: Vec::new(),
            info: InstructionInfoFactory::new(),
        }
    }

    /// The items, and the number of the register that addresses memory.
    pub(super) fn build(mut self) -> Option<(Vec<Instruction>, usize)> {
        let length = self.rng.usize(3..30);
        self.sequence(length, Loops::Allowed)?;
        self.add(Instruction::with(Code::Int3));
        for call in std::mem::take(&mut self.calls) {
            self.target(call);
            let length = self.rng.usize(1..6);
            self.plain_sequence(length)?;
            let ret = match self.forms.mode {
                Mode::Long => Code::Retnq,
                Mode::Compat32 => Code::Retnd,
                Mode::Compat16 => Code::Retnw,
            };
            self.add(Instruction::with(ret));
        }
        Some((self.items, self.base))
    }

    fn long(&self) -> bool {
        self.forms.mode == Mode::Long
    }

    fn sequence(&mut self, length: usize, loops: Loops) -> Option<()> {
        for _ in 0..length {
            match self.rng.u8(..100) {
                0..78 => self.plain()?,
                78..88 => self.forward_branch()?,
                88..92 if loops == Loops::Allowed => self.counted_loop()?,
                92..96 => self.call(),
                _ => self.indirect_jump()?,
            }
        }
        Some(())
    }

    fn plain_sequence(&mut self, length: usize) -> Option<()> {
        (0..length).try_for_each(|_| self.plain())
    }

    /// Appends an item and answers its index.
    fn add(&mut self, mut instruction: Instruction) -> usize {
        let index = self.items.len();
        instruction.set_ip(number(index));
        self.items.push(instruction);
        index
    }

    /// Lets the branch at `index` lead to the next item.
    fn target(&mut self, index: usize) {
        let next = number(self.items.len());
        let item = &mut self.items[index];
        if item.is_ip_rel_memory_operand() {
            item.set_memory_displacement64(next);
        } else {
            set_branch(item, next);
        }
    }

    /// A branch to be given its target: the first form in 64-bit mode, the others in 32 and 16 bits.
    fn branch(&mut self, forms: [Code; 3]) -> usize {
        let (code, kind) = match self.forms.mode {
            Mode::Long => (forms[0], OpKind::NearBranch64),
            Mode::Compat32 => (forms[1], OpKind::NearBranch32),
            Mode::Compat16 => (forms[2], OpKind::NearBranch16),
        };
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op0_kind(kind);
        self.add(instruction)
    }

    fn plain(&mut self) -> Option<()> {
        let instruction = (0..ATTEMPTS).find_map(|_| self.draw())?;
        self.prepare(&instruction);
        self.add(instruction);
        Some(())
    }

    fn draw(&mut self) -> Option<Instruction> {
        let list = if self.rng.bool() {
            &self.forms.integer
        } else {
            &self.forms.all
        };
        let form = *list.get(self.rng.usize(..list.len().max(1)))?;
        let rare = matches!(form.code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        if rare && self.rng.u8(..4) != 0 {
            return None;
        }
        let encoded = operands::build(
            form,
            CODE.raw() - self.forms.mode.code_base(),
            self.choice,
            self.rng,
        )?;
        let reserved = [self.base, self.counter].map(|r| Register::RAX + r as u32);
        let info = self.info.info(&encoded.instruction);
        let spoils = info.used_registers().iter().any(|used| {
            reserved.contains(&used.register().full_register())
                && !matches!(
                    used.access(),
                    iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead
                )
        });
        (!spoils).then_some(encoded.instruction)
    }

    /// Gives the registers that the instruction addresses memory with a value for it.
    fn prepare(&mut self, instruction: &Instruction) {
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
            let count = self.rng.u64(..24);
            self.set(Register::RCX, count);
        }
        let bits = matches!(
            instruction.mnemonic(),
            Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts
        );
        if bits && instruction.op0_kind() == OpKind::Memory && instruction.op1_register().is_gpr() {
            let bit = self.rng.i64(-2000..2000) as u64;
            self.set(instruction.op1_register(), bit);
        }
        let accesses = self.info.info(instruction).used_memory().to_vec();
        for memory in accesses {
            let own = [self.base, 4].map(|r| Register::RAX + r as u32);
            let base = memory.base().full_register();
            if !base.is_gpr() || own.contains(&base) {
                continue;
            }
            let mut target = WINDOWS[0].raw() + 0x400 - self.forms.mode.data_base();
            target += self.rng.u64(..WRITABLE_BYTES as u64 - 0x800) & !15;
            let mut offset = memory.displacement();
            if memory.index().is_gpr() && memory.index().full_register() != base {
                let index = self.rng.u64(..64);
                self.set(memory.index(), index);
                offset = offset.wrapping_add(index * u64::from(memory.scale()));
            }
            self.set(base, target.wrapping_sub(offset));
        }
    }

    /// `mov $value, %register`, which leaves the flags alone.
    fn set(&mut self, register: Register, value: u64) {
        let number = register.full_register() as u32 - Register::RAX as u32;
        if number as usize == self.base || number as usize == self.counter {
            return;
        }
        let (code, register) = if self.long() {
            (Code::Mov_r64_imm64, Register::RAX + number)
        } else {
            (Code::Mov_r32_imm32, Register::EAX + number)
        };
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_op0_kind(OpKind::Register);
        instruction.set_op0_register(register);
        if self.long() {
            instruction.set_op1_kind(OpKind::Immediate64);
            instruction.set_immediate64(value);
        } else {
            instruction.set_op1_kind(OpKind::Immediate32);
            instruction.set_immediate32(value as u32);
        }
        self.add(instruction);
    }

    fn forward_branch(&mut self) -> Option<()> {
        let condition = self.rng.usize(..16);
        let branch = self.branch(JCC[condition]);
        let length = self.rng.usize(1..5);
        self.plain_sequence(length)?;
        self.target(branch);
        Some(())
    }

    fn counted_loop(&mut self) -> Option<()> {
        let counter = wide(self.forms.mode) + self.counter as u32;
        let rounds = self.rng.i32(1..40);
        let (set, decrement) = match self.forms.mode {
            Mode::Long => (Code::Mov_rm64_imm32, Code::Dec_rm64),
            Mode::Compat32 => (Code::Mov_r32_imm32, Code::Dec_rm32),
            Mode::Compat16 => (Code::Mov_r16_imm16, Code::Dec_rm16),
        };
        self.add(Instruction::with2(set, counter, rounds).ok()?);
        let top = self.items.len();
        let length = self.rng.usize(1..8);
        self.sequence(length, Loops::Forbidden)?;
        self.add(Instruction::with1(decrement, counter).ok()?);
        let back = self.branch([Code::Jne_rel32_64, Code::Jne_rel32_32, Code::Jne_rel16]);
        set_branch(&mut self.items[back], number(top));
        Some(())
    }

    fn call(&mut self) {
        let call = self.branch([Code::Call_rel32_64, Code::Call_rel32_32, Code::Call_rel16]);
        self.calls.push(call);
    }

    /// `lea label(%rip), %reg; jmp *%reg`, in 64-bit mode; elsewhere a plain jump.
    fn indirect_jump(&mut self) -> Option<()> {
        let branch = if self.long() {
            let register = Register::RAX + [0, 1, 2, 3, 6, 7][self.rng.usize(..6)];
            let label = MemoryOperand::with_base_displ(Register::RIP, 0);
            let lea = Instruction::with2(Code::Lea_r64_m, register, label).ok()?;
            let lea = self.add(lea);
            self.add(Instruction::with1(Code::Jmp_rm64, register).ok()?);
            lea
        } else {
            self.branch([Code::Jmp_rel32_64, Code::Jmp_rel32_32, Code::Jmp_rel16])
        };
        let length = self.rng.usize(..3);
        self.plain_sequence(length)?;
        self.target(branch);
        Some(())
    }
}

/// Loops don't nest: there is one counter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loops {
    Allowed,
    Forbidden,
}

/// The name of the item with this index, where addresses are expected.
fn number(index: usize) -> u64 {
    index as u64 + 1
}

fn set_branch(item: &mut Instruction, target: u64) {
    match item.op0_kind() {
        OpKind::NearBranch64 => item.set_near_branch64(target),
        OpKind::NearBranch32 => item.set_near_branch32(target as u32),
        _ => item.set_near_branch16(target as u16),
    }
}

/// What addresses memory, by its first register.
fn wide(mode: Mode) -> Register {
    match mode {
        Mode::Long => Register::RAX,
        Mode::Compat32 => Register::EAX,
        Mode::Compat16 => Register::AX,
    }
}

const JCC: [[Code; 3]; 16] = [
    [Code::Jo_rel32_64, Code::Jo_rel32_32, Code::Jo_rel16],
    [Code::Jno_rel32_64, Code::Jno_rel32_32, Code::Jno_rel16],
    [Code::Jb_rel32_64, Code::Jb_rel32_32, Code::Jb_rel16],
    [Code::Jae_rel32_64, Code::Jae_rel32_32, Code::Jae_rel16],
    [Code::Je_rel32_64, Code::Je_rel32_32, Code::Je_rel16],
    [Code::Jne_rel32_64, Code::Jne_rel32_32, Code::Jne_rel16],
    [Code::Jbe_rel32_64, Code::Jbe_rel32_32, Code::Jbe_rel16],
    [Code::Ja_rel32_64, Code::Ja_rel32_32, Code::Ja_rel16],
    [Code::Js_rel32_64, Code::Js_rel32_32, Code::Js_rel16],
    [Code::Jns_rel32_64, Code::Jns_rel32_32, Code::Jns_rel16],
    [Code::Jp_rel32_64, Code::Jp_rel32_32, Code::Jp_rel16],
    [Code::Jnp_rel32_64, Code::Jnp_rel32_32, Code::Jnp_rel16],
    [Code::Jl_rel32_64, Code::Jl_rel32_32, Code::Jl_rel16],
    [Code::Jge_rel32_64, Code::Jge_rel32_32, Code::Jge_rel16],
    [Code::Jle_rel32_64, Code::Jle_rel32_32, Code::Jle_rel16],
    [Code::Jg_rel32_64, Code::Jg_rel32_32, Code::Jg_rel16],
];
