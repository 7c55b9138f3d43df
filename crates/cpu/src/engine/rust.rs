//! Instructions that are run in Rust: those that no translation is worth, because they are rare and
//! touch memory many times, or have no encoding in 64-bit mode.

use addr::Gva;
use iced_x86::{Code, Instruction, Mnemonic};
use x86::rflags;

use super::masked::Gathered;
use super::memory::privilege_of;
use super::segments::{bad_address, checked, is_canonical};
use super::sites::Then;
use super::vcpu::Vcpu;
use crate::state::gpr::{RAX, RBP, RSP};
use crate::system::Abort;
use crate::translate::Use;
use crate::{Exception, Platform};

/// The registers of `PUSHA`, in the order in which they are pushed.
const ALL: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

impl Vcpu {
    /// Runs an instruction at RIP.
    pub(super) fn run_in_rust(
        &mut self,
        instruction: &Instruction,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        use Mnemonic as M;
        if instruction.is_string_instruction() {
            return self.run_string(instruction, platform);
        }
        self.flags_out();
        self.memory.mmio.begin();
        match instruction.mnemonic() {
            M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq => {
                if self.gather(instruction, platform)? == Gathered::Some {
                    return Ok(Then::Done);
                }
            }
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
                self.masked_move(instruction, platform)?;
            }
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => self.masked_bytes(instruction)?,
            M::Pusha | M::Pushad => self.push_all(instruction)?,
            M::Popa | M::Popad => self.pop_all(instruction)?,
            M::Enter => self.enter_frame(instruction)?,
            M::Salc => {
                let carry = self.state().rflags & rflags::CF != 0;
                self.set_al(if carry { 0xff } else { 0 });
            }
            M::Aam | M::Aad => self.adjust_by_division(instruction)?,
            M::Aaa | M::Aas | M::Daa | M::Das => self.adjust(instruction.mnemonic()),
            _ => {
                return Err(Abort::Exception(Exception {
                    vector: x86::vector::UD,
                    error_code: None,
                    payload: None,
                }));
            }
        }
        self.flags_in();
        self.memory.mmio.end();
        self.frame_mut().state.rip = instruction.next_ip();
        Ok(Then::Done)
    }

    fn set_al(&mut self, value: u8) {
        let rax = &mut self.frame_mut().state.gpr[RAX];
        *rax = *rax & !0xff | u64::from(value);
    }

    /// The linear address of a stack slot.
    pub(super) fn stack_gva(&self, pointer: u64, size: usize, usage: Use) -> Result<Gva, Abort> {
        let state = self.state();
        if self.context.mode.is_64() {
            let last = pointer.wrapping_add(size as u64 - 1);
            return if is_canonical(pointer, state) && is_canonical(last, state) {
                Ok(Gva::new(pointer))
            } else {
                Err(bad_address(2))
            };
        }
        let mask = self.stack_mask();
        checked(state, 2, (pointer & mask) as u32, size as u32, usage)
    }

    fn stack_mask(&self) -> u64 {
        match self.context.mode.stack_bits() {
            64 => u64::MAX,
            32 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let rsp = &mut self.frame_mut().state.gpr[RSP];
        *rsp = if mask == 0xffff {
            *rsp & !mask | value & mask
        } else {
            value & mask
        };
    }

    fn push_values(&mut self, pointer: u64, values: &[u64], size: usize) -> Result<u64, Abort> {
        let privilege = privilege_of(self.context.mode.view());
        let mut at = pointer;
        for value in values {
            at = at.wrapping_sub(size as u64) & self.stack_mask();
            let gva = self.stack_gva(at, size, Use::WriteOnly)?;
            self.memory
                .write_as(gva, &value.to_le_bytes()[..size], privilege)?;
        }
        Ok(at)
    }

    fn read_stack(&mut self, pointer: u64, size: usize) -> Result<u64, Abort> {
        let privilege = privilege_of(self.context.mode.view());
        let gva = self.stack_gva(pointer, size, Use::Read)?;
        let mut bytes = [0; 8];
        self.memory.read_as(gva, &mut bytes[..size], privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn push_all(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let size = if instruction.code() == Code::Pushaw {
            2
        } else {
            4
        };
        let gpr = self.state().gpr;
        let values = ALL.map(|r| gpr[r]);
        let pointer = self.push_values(gpr[RSP], &values, size)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    fn pop_all(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let size = if instruction.code() == Code::Popaw {
            2
        } else {
            4
        };
        let mut pointer = self.state().gpr[RSP];
        for register in ALL.into_iter().rev() {
            // What was popped before a fault stays, but for the stack pointer.
            let value = self.read_stack(pointer, size)?;
            pointer = pointer.wrapping_add(size as u64);
            if register == RSP {
                continue;
            }
            let old = &mut self.frame_mut().state.gpr[register];
            *old = if size == 2 {
                *old & !0xffff | value
            } else {
                value
            };
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// `ENTER` (SDM 1, 6.6).
    fn enter_frame(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let size = match instruction.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let level = usize::from(instruction.immediate8_2nd() & 31);
        let gpr = self.state().gpr;
        let mask = self.stack_mask();
        let frame_pointer = gpr[RSP].wrapping_sub(size as u64);
        let mut pointer = self.push_values(gpr[RSP], &[gpr[RBP]], size)?;
        for i in 1..level {
            let at = gpr[RBP].wrapping_sub((i * size) as u64);
            let value = self.read_stack(at & mask, size)?;
            pointer = self.push_values(pointer, &[value], size)?;
        }
        if level > 0 {
            pointer = self.push_values(pointer, &[frame_pointer], size)?;
        }
        let bottom = pointer.wrapping_sub(u64::from(instruction.immediate16()));
        // The new top must be writable, or the instruction faults with nothing changed.
        let privilege = privilege_of(self.context.mode.view());
        let gva = self.stack_gva(bottom & mask, size, Use::WriteOnly)?;
        self.memory.writable(gva, size, privilege)?;
        let frame = self.frame_mut();
        let rbp = &mut frame.state.gpr[RBP];
        *rbp = match size {
            2 => *rbp & !0xffff | frame_pointer & 0xffff,
            4 => frame_pointer & 0xffff_ffff,
            _ => frame_pointer,
        };
        self.set_stack_pointer(bottom);
        Ok(())
    }

    fn adjust_by_division(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        let ax = self.state().gpr[RAX] as u16;
        let (al, ah) = (ax as u8, (ax >> 8) as u8);
        let base = instruction.immediate8();
        if instruction.mnemonic() == Mnemonic::Aad {
            let sum = Sum::of_bytes(al, ah.wrapping_mul(base), Direction::Up);
            self.set_ax(sum.result);
            self.set_arithmetic(sum.flags);
            return Ok(());
        }
        if base == 0 {
            return Err(Abort::Exception(Exception::plain(x86::vector::DE)));
        }
        let sum = Sum::of_bytes(al % base, 0, Direction::Up);
        self.set_ax(u16::from(al / base) << 8 | sum.result);
        self.set_arithmetic(sum.flags);
        Ok(())
    }

    fn set_ax(&mut self, value: u16) {
        let rax = &mut self.frame_mut().state.gpr[RAX];
        *rax = *rax & !0xffff | u64::from(value);
    }

    fn set_arithmetic(&mut self, flags: u64) {
        let all = &mut self.frame_mut().state.rflags;
        *all = *all & !rflags::ARITHMETIC | flags;
    }

    /// `AAA`, `AAS`, `DAA`, `DAS`. The flags that the manuals leave undefined are those of the addition
    /// that adjusts, as AMD's CPUs have them.
    fn adjust(&mut self, mnemonic: Mnemonic) {
        let flags = self.state().rflags;
        let (carry, aux) = (flags & rflags::CF != 0, flags & rflags::AF != 0);
        let ax = self.state().gpr[RAX] as u16;
        let al = ax as u8;
        let low = al & 0xf > 9 || aux;
        let direction = match mnemonic {
            Mnemonic::Aaa | Mnemonic::Daa => Direction::Up,
            _ => Direction::Down,
        };
        let (sum, carry) = if matches!(mnemonic, Mnemonic::Aaa | Mnemonic::Aas) {
            let sum = Sum::of_words(ax, if low { 0x106 } else { 0 }, direction);
            self.set_ax(sum.result & 0xff0f);
            (sum, low)
        } else {
            let high = al > 0x99 || carry;
            let delta = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
            let sum = Sum::of_bytes(al, delta, direction);
            self.set_al(sum.result as u8);
            let borrow = direction == Direction::Down && low && al < 6;
            (sum, high || borrow)
        };
        let others = sum.flags & !(rflags::CF | rflags::AF);
        let carries = if carry { rflags::CF } else { 0 } | if low { rflags::AF } else { 0 };
        self.set_arithmetic(others | carries);
    }
}

/// Whether a decimal adjustment adds or subtracts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// A sum or difference, and all arithmetic flags of it.
struct Sum {
    result: u16,
    flags: u64,
}

impl Sum {
    fn of_bytes(a: u8, b: u8, direction: Direction) -> Self {
        Self::of(u32::from(a), u32::from(b), direction, 8)
    }

    fn of_words(a: u16, b: u16, direction: Direction) -> Self {
        Self::of(u32::from(a), u32::from(b), direction, 16)
    }

    fn of(a: u32, b: u32, direction: Direction, bits: u32) -> Self {
        let (wide, may_overflow) = match direction {
            Direction::Up => (a.wrapping_add(b), !(a ^ b)),
            Direction::Down => (a.wrapping_sub(b), a ^ b),
        };
        let result = wide & ((1 << bits) - 1);
        let top = bits - 1;
        let conditions = [
            (rflags::CF, wide >> bits & 1 != 0),
            (rflags::PF, (result as u8).count_ones().is_multiple_of(2)),
            (rflags::AF, (a ^ b ^ result) & 0x10 != 0),
            (rflags::ZF, result == 0),
            (rflags::SF, result >> top & 1 != 0),
            (rflags::OF, (may_overflow & (a ^ result)) >> top & 1 != 0),
        ];
        let set = conditions.into_iter().filter(|(_, set)| *set);
        Self {
            result: result as u16,
            flags: set.fold(0, |all, (flag, _)| all | flag),
        }
    }
}
