//! Vector instructions that touch memory element by element: gathers, and moves under a mask.
//!
//! Only elements that the mask selects can fault, so one check of the whole operand would be wrong
//! (SDM 2C, `VGATHERDPS`, `VMASKMOV`, `MASKMOVDQU`). Vector registers are in the frame while Rust runs.

#![expect(
    unsafe_code,
    reason = "one MMX instruction, for its effect on the x87 tags"
)]

use addr::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::memory::privilege_of;
use super::segments::{bad_address, checked, is_canonical, segment};
use super::vcpu::Vcpu;
use crate::Platform;
use crate::system::Abort;
use crate::translate::{Use, address_bits, segment_of};
use x86::rflags;

/// How far a gather has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gathered {
    All,
    /// A single step ends between two elements; the mask tells where it goes on.
    Some,
}

/// How many elements of which size.
#[derive(Clone, Copy, Debug)]
struct Shape {
    elements: usize,
    /// Bytes of an element in the data and the mask.
    size: usize,
}

fn gather_shape(instruction: &Instruction) -> Option<Shape> {
    use Mnemonic as M;
    let (index, size) = match instruction.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq => (4, 8),
        M::Vgatherqps | M::Vpgatherqd => (8, 4),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8),
        _ => return None,
    };
    let data = instruction.op0_register().size() / size;
    let indices = instruction.memory_index().size() / index;
    Some(Shape {
        elements: data.min(indices),
        size,
    })
}

fn mask_move_size(instruction: &Instruction) -> usize {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        _ => 1,
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

impl Vcpu {
    fn vector(&self, register: Register) -> [u8; 32] {
        self.frame().vectors[register.number()]
    }

    fn set_vector(&mut self, register: Register, value: [u8; 32]) {
        self.frame_mut().vectors[register.number()] = value;
    }

    /// The offset of an element of the memory operand.
    fn element_offset(&self, instruction: &Instruction, operand: u32, element: usize) -> u64 {
        let state = self.state();
        let address = instruction.virtual_address(operand, element, |register, at, size| {
            if register.is_segment_register() {
                return Some(0);
            }
            if register.is_vector_register() {
                let vector = self.vector(register);
                let bytes = &vector[at * size..(at + 1) * size];
                return Some(if size == 4 {
                    word(bytes) as i32 as u64
                } else {
                    word(bytes)
                });
            }
            let value = state.gpr[register.full_register().number()];
            Some(match register.size() {
                4 => value & 0xffff_ffff,
                2 => value & 0xffff,
                _ => value,
            })
        });
        address.unwrap_or(0)
    }

    /// The linear address of `size` bytes, `skip` beyond an offset in the segment of the operand.
    fn element_address(
        &self,
        instruction: &Instruction,
        offset: u64,
        skip: usize,
        size: usize,
        usage: Use,
    ) -> Result<Gva, Abort> {
        let number = segment_of(instruction, self.context.mode);
        let state = self.state();
        if !self.context.mode.is_64() {
            let bits = match instruction.op0_kind() {
                OpKind::MemorySegDI => 16,
                OpKind::MemorySegEDI => 32,
                _ => address_bits(instruction, self.context.mode),
            };
            let mask = if bits == 16 { 0xffff } else { 0xffff_ffff };
            let offset = (offset.wrapping_add(skip as u64) & mask) as u32;
            return checked(state, number, offset, size as u32, usage);
        }
        let base = match number {
            4 | 5 => segment(state, number).base,
            _ => 0,
        };
        let mask = match address_bits(instruction, self.context.mode) {
            32 => 0xffff_ffff,
            _ => u64::MAX,
        };
        let first = base.wrapping_add(offset.wrapping_add(skip as u64) & mask);
        let last = first.wrapping_add(size as u64 - 1);
        let legal = is_canonical(first, state) && is_canonical(last, state);
        let start = Gva::new(base.wrapping_add(offset));
        if legal && !self.is_offset_beyond(start, number) {
            Ok(Gva::new(first))
        } else {
            Err(bad_address(number))
        }
    }

    /// `VGATHER` and `VPGATHER`: an element that was read is taken out of the mask at once, so that
    /// the instruction can begin again where it stopped.
    pub(super) fn gather(
        &mut self,
        instruction: &Instruction,
        platform: &mut dyn Platform,
    ) -> Result<Gathered, Abort> {
        let Some(Shape { elements, size }) = gather_shape(instruction) else {
            return Ok(Gathered::All);
        };
        let (target, mask) = (instruction.op0_register(), instruction.op2_register());
        let steps = self.state().rflags & rflags::TF != 0;
        let mut progress = false;
        for element in 0..elements {
            let at = element * size;
            if self.vector(mask)[at + size - 1] & 0x80 != 0 {
                let value = match self.gathered(instruction, element, size, platform) {
                    // The trap of what was done comes in lieu of the fault.
                    Err(Abort::Exception(_)) if progress && steps => return Ok(Gathered::Some),
                    value => value?,
                };
                progress = true;
                let frame = self.frame_mut();
                frame.vectors[target.number()][at..at + size]
                    .copy_from_slice(&value.to_le_bytes()[..size]);
            }
            self.frame_mut().vectors[mask.number()][at..at + size].fill(0);
        }
        let frame = self.frame_mut();
        frame.vectors[mask.number()].fill(0);
        frame.vectors[target.number()][elements * size..].fill(0);
        Ok(Gathered::All)
    }

    fn gathered(
        &mut self,
        instruction: &Instruction,
        element: usize,
        size: usize,
        platform: &mut dyn Platform,
    ) -> Result<u64, Abort> {
        let offset = self.element_offset(instruction, 1, element);
        let gva = self.element_address(instruction, offset, 0, size, Use::Read)?;
        self.read_element(gva, size, platform)
    }

    /// `VMASKMOV` and `VPMASKMOV`.
    pub(super) fn masked_move(
        &mut self,
        instruction: &Instruction,
        platform: &mut dyn Platform,
    ) -> Result<(), Abort> {
        let size = mask_move_size(instruction);
        if instruction.op0_kind() == OpKind::Memory {
            let source = self.vector(instruction.op2_register());
            let mask = self.vector(instruction.op1_register());
            let length = instruction.op2_register().size();
            return self.masked_store(instruction, &source[..length], &mask[..length], size);
        }
        let target = instruction.op0_register();
        let mask = self.vector(instruction.op1_register());
        let mut result = [0; 32];
        let offset = self.element_offset(instruction, 2, 0);
        for at in (0..target.size()).step_by(size) {
            if mask[at + size - 1] & 0x80 != 0 {
                let gva = self.element_address(instruction, offset, at, size, Use::Read)?;
                let value = self.read_element(gva, size, platform)?;
                result[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
        }
        self.set_vector(target, result);
        Ok(())
    }

    /// `MASKMOVDQU`, `VMASKMOVDQU` and `MASKMOVQ`: bytes to the address in DI.
    pub(super) fn masked_bytes(&mut self, instruction: &Instruction) -> Result<(), Abort> {
        if instruction.mnemonic() != Mnemonic::Maskmovq {
            let source = self.vector(instruction.op1_register());
            let mask = self.vector(instruction.op2_register());
            return self.masked_store(instruction, &source[..16], &mask[..16], 1);
        }
        if super::enter::has_pending_x87() {
            return Err(Abort::Exception(crate::Exception::plain(x86::vector::MF)));
        }
        // As the first of all MMX instructions it makes the top of stack zero and all registers valid,
        // even where a fault follows.
        // SAFETY: changes only the x87 tags and the top of stack, as the guest's instruction does.
        unsafe { std::arch::asm!("movd {0:e}, mm0", out(reg) _, options(nomem, nostack)) };
        self.fpu_out();
        let register = |number: usize| {
            let mut bytes = [0; 8];
            let image = self.frame().fpu.image();
            bytes.copy_from_slice(&image[32 + 16 * number..][..8]);
            bytes
        };
        let source = register(instruction.op1_register().number());
        let mask = register(instruction.op2_register().number());
        self.masked_store(instruction, &source, &mask, 1)
    }

    /// Writes the elements that the mask selects, after all of them were found writable.
    fn masked_store(
        &mut self,
        instruction: &Instruction,
        source: &[u8],
        mask: &[u8],
        size: usize,
    ) -> Result<(), Abort> {
        let privilege = privilege_of(self.context.mode.view());
        let offset = self.element_offset(instruction, 0, 0);
        let selected = || {
            (0..source.len())
                .step_by(size)
                .filter(|at| mask[at + size - 1] & 0x80 != 0)
        };
        let address =
            |vcpu: &Self, at, len| vcpu.element_address(instruction, offset, at, len, Use::Write);
        if size == 1 {
            // MASKMOVDQU and MASKMOVQ fault for what they would not write, too.
            let first = address(self, 0, 8)?;
            self.memory.writable(first, 8, privilege)?;
            let all = address(self, 0, source.len())?;
            self.memory.writable(all, source.len(), privilege)?;
        } else {
            for at in selected() {
                let gva = address(self, at, size)?;
                self.memory.writable(gva, size, privilege)?;
            }
        }
        for at in selected() {
            let gva = address(self, at, size)?;
            self.memory
                .write_as(gva, &source[at..at + size], privilege)?;
        }
        Ok(())
    }
}
