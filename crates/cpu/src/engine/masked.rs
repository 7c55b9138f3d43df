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
use super::segments::{bad_address, is_canonical, segment};
use super::vcpu::Vcpu;
use crate::Platform;
use crate::system::Abort;

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

    /// The linear address of an element of the memory operand, as an exception would have it checked.
    fn element_address(
        &self,
        instruction: &Instruction,
        operand: u32,
        element: usize,
    ) -> Result<Gva, Abort> {
        let state = self.state();
        let flat = self.context.mode.is_64();
        let address = instruction.virtual_address(operand, element, |register, at, size| {
            if register.is_segment_register() {
                let number = register.number() as u8;
                let base = segment(state, number).base;
                return Some(if flat && number < 4 { 0 } else { base });
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
        let address = address.unwrap_or(0);
        if !flat {
            return Ok(Gva::new(address & 0xffff_ffff));
        }
        if is_canonical(address, state) {
            Ok(Gva::new(address))
        } else {
            Err(bad_address(0))
        }
    }

    /// `VGATHER` and `VPGATHER`: an element that was read is taken out of the mask at once, so that
    /// the instruction can begin again where it stopped.
    pub(super) fn gather(
        &mut self,
        instruction: &Instruction,
        platform: &mut dyn Platform,
    ) -> Result<(), Abort> {
        let Some(Shape { elements, size }) = gather_shape(instruction) else {
            return Ok(());
        };
        let (target, mask) = (instruction.op0_register(), instruction.op2_register());
        for element in 0..elements {
            let at = element * size;
            if self.vector(mask)[at + size - 1] & 0x80 != 0 {
                let gva = self.element_address(instruction, 1, element)?;
                let value = self.read_element(gva, size, platform)?;
                let frame = self.frame_mut();
                frame.vectors[target.number()][at..at + size]
                    .copy_from_slice(&value.to_le_bytes()[..size]);
            }
            self.frame_mut().vectors[mask.number()][at..at + size].fill(0);
        }
        let frame = self.frame_mut();
        frame.vectors[mask.number()].fill(0);
        frame.vectors[target.number()][elements * size..].fill(0);
        Ok(())
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
        for at in (0..target.size()).step_by(size) {
            if mask[at + size - 1] & 0x80 != 0 {
                let gva = self.element_address(instruction, 2, 0)?;
                let gva = addr::Address::wrapping_add(gva, at as u64);
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
        self.fpu_out();
        // The error summary of the status word: an exception waits for the next instruction.
        if self.frame().fpu.is_exception_pending() {
            return Err(Abort::Exception(crate::Exception {
                vector: x86::vector::MF,
                error_code: None,
                payload: None,
            }));
        }
        let register = |number: usize| {
            let mut bytes = [0; 8];
            let image = self.frame().fpu.image();
            bytes.copy_from_slice(&image[32 + 16 * number..][..8]);
            bytes
        };
        let source = register(instruction.op1_register().number());
        let mask = register(instruction.op2_register().number());
        self.masked_store(instruction, &source, &mask, 1)?;
        // SAFETY: changes only the x87 tags and the top of stack, as the guest's instruction does.
        unsafe { std::arch::asm!("movq mm0, mm0", options(nomem, nostack)) };
        Ok(())
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
        let base = self.element_address(instruction, 0, 0)?;
        let address = |at: usize| addr::Address::wrapping_add(base, at as u64);
        let selected = || {
            (0..source.len())
                .step_by(size)
                .filter(|at| mask[at + size - 1] & 0x80 != 0)
        };
        for at in selected() {
            self.memory.writable(address(at), size, privilege)?;
        }
        if size == 1 {
            // MASKMOVDQU and MASKMOVQ fault for what they would not write, too.
            self.memory.writable(base, source.len(), privilege)?;
        }
        for at in selected() {
            self.memory
                .write_as(address(at), &source[at..at + size], privilege)?;
        }
        Ok(())
    }
}
