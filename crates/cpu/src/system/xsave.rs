//! The XSAVE family on the image of the registers (SDM 1, 13.7 to 13.12).
//!
//! Components that exist here: x87, SSE, AVX. The compacted format places AVX where the standard one
//! does, since nothing lies between.

use addr::{Address, Gva};
use iced_x86::{Instruction, Mnemonic, OpKind};
use x86::control::{Cr0, Cr4};
use x86::vector;
use x86::xstate::{
    AVX, AVX_OFFSET, AVX_SIZE, EXTENDED_OFFSET, FCW_INIT, HEADER_SIZE, LEGACY_SIZE, MXCSR_INIT,
    MXCSR_OFFSET, SSE, X87, XCOMP_BV_COMPACTED, XCOMP_BV_OFFSET, XMM_OFFSET, XSTATE_BV_OFFSET,
};

use super::fault::{general, undefined};
use super::offer::Instructions;
use super::operand::Want;
use super::{Abort, Context, Next};
use crate::Exception;
use crate::fpu::{Layout, mxcsr_mask};

/// Where the x87 registers proper lie in the legacy region.
const ST: std::ops::Range<usize> = 32..XMM_OFFSET;
/// FCW to FDP.
const X87_CONTROL: std::ops::Range<usize> = 0..MXCSR_OFFSET;
const XMM: std::ops::Range<usize> = XMM_OFFSET..XMM_OFFSET + 256;
const MXCSR: std::ops::Range<usize> = MXCSR_OFFSET..MXCSR_OFFSET + 8;
const YMM_HIGH: std::ops::Range<usize> = AVX_OFFSET..AVX_OFFSET + AVX_SIZE;
const AREA: usize = EXTENDED_OFFSET + AVX_SIZE;

/// The layout of the area in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Standard,
    Compacted,
}

/// What `XSAVE` does with components in their initial state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Initial {
    Written,
    LeftOut,
}

fn layout_of(mnemonic: Mnemonic) -> Layout {
    let wide = matches!(
        mnemonic,
        Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xsaves64
            | Mnemonic::Xrstor64
            | Mnemonic::Xrstors64
    );
    if wide { Layout::Wide } else { Layout::Narrow }
}

fn qword(bytes: &[u8], offset: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(raw)
}

impl Context<'_> {
    /// Components that are not in their initial state: `XINUSE`, and MXCSR counts as part of SSE
    /// (SDM 1, 13.6).
    fn in_use(&self) -> u64 {
        let image = self.fpu.image();
        // All of them at once: registers in use seldom begin with what is not zero.
        let is_zero = |range: std::ops::Range<usize>| {
            image[range].iter().fold(0, |all, byte| all | byte) == 0
        };
        let x87 = image[..2] != FCW_INIT.to_le_bytes() || !is_zero(2..MXCSR_OFFSET) || !is_zero(ST);
        let sse = self.fpu.mxcsr() != MXCSR_INIT || !is_zero(XMM);
        let avx = !is_zero(YMM_HIGH);
        [(X87, x87), (SSE, sse), (AVX, avx)]
            .into_iter()
            .filter(|(_, used)| *used)
            .fold(0, |all, (component, _)| all | component)
    }

    fn require_xsave(&self, instruction: &Instruction) -> Result<(), Abort> {
        let needed = match instruction.mnemonic() {
            Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => Instructions::XSAVEOPT,
            Mnemonic::Xsavec | Mnemonic::Xsavec64 => Instructions::XSAVEC,
            Mnemonic::Xsaves | Mnemonic::Xsaves64 | Mnemonic::Xrstors | Mnemonic::Xrstors64 => {
                Instructions::XSAVES
            }
            _ => Instructions::empty(),
        };
        if !self.state.cr4_has(Cr4::OSXSAVE) || !self.offer.instructions.contains(needed) {
            return Err(undefined());
        }
        if needed == Instructions::XSAVES {
            self.require_cpl0()?;
        }
        if self.state.cr0_has(Cr0::TS) {
            return Err(Exception::plain(vector::NM).into());
        }
        Ok(())
    }

    /// The area of the instruction, which must be aligned. A page fault of its beginning comes before
    /// what is wrong with the addresses of the rest.
    fn xsave_area(&mut self, instruction: &Instruction, want: Want) -> Result<Gva, Abort> {
        const FIRST: usize = 64;
        let op = instruction.op0_kind();
        debug_assert_eq!(op, OpKind::Memory);
        if !self.is_aligned(instruction, 64) {
            return Err(general());
        }
        let gva = self.operand_address(instruction, 0, FIRST as u64, want)?;
        self.probe(gva, FIRST, want)?;
        self.operand_address(instruction, 0, EXTENDED_OFFSET as u64, want)
    }

    fn area_write(&mut self, gva: Gva, range: std::ops::Range<usize>) -> Result<(), Abort> {
        let privilege = self.state.explicit_privilege();
        let at = Gva::new(gva.raw().wrapping_add(range.start as u64));
        let bytes = &self.fpu.image()[range];
        self.memory.write(at, bytes, privilege)
    }

    fn header_write(&mut self, gva: Gva, offset: usize, value: u64) -> Result<(), Abort> {
        let privilege = self.state.explicit_privilege();
        let at = Gva::new(gva.raw().wrapping_add(offset as u64));
        self.memory.write(at, &value.to_le_bytes(), privilege)
    }

    /// `XSAVE`, `XSAVEOPT`, `XSAVEC`, `XSAVES`.
    pub(super) fn xsave(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_xsave(instruction)?;
        let (format, initial) = match instruction.mnemonic() {
            Mnemonic::Xsave | Mnemonic::Xsave64 => (Format::Standard, Initial::Written),
            Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => (Format::Standard, Initial::LeftOut),
            _ => (Format::Compacted, Initial::LeftOut),
        };
        let gva = self.xsave_area(instruction, Want::Write)?;
        let asked = self.state.edx_eax() & self.state.xcr0;
        let in_use = self.in_use();
        let len = if asked & AVX == 0 {
            EXTENDED_OFFSET
        } else {
            AREA
        };
        let privilege = self.state.explicit_privilege();
        self.memory.check_write(gva, len, privilege)?;
        let written = match initial {
            Initial::Written => asked,
            Initial::LeftOut => asked & in_use,
        };
        let mxcsr = match format {
            Format::Standard => asked & (SSE | AVX) != 0,
            Format::Compacted => written & SSE != 0,
        };
        if mxcsr {
            self.area_write(gva, MXCSR)?;
        }
        self.save_components(gva, written, instruction.mnemonic())?;
        match format {
            Format::Standard => {
                let at = Gva::new(gva.raw().wrapping_add(XSTATE_BV_OFFSET as u64));
                let old = self.load(at, 8)?;
                self.header_write(gva, XSTATE_BV_OFFSET, old & !asked | in_use & asked)?;
            }
            Format::Compacted => {
                self.header_write(gva, XSTATE_BV_OFFSET, in_use & asked)?;
                self.header_write(gva, XCOMP_BV_OFFSET, asked | XCOMP_BV_COMPACTED)?;
            }
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    fn save_components(&mut self, gva: Gva, written: u64, mnemonic: Mnemonic) -> Result<(), Abort> {
        if written & X87 != 0 {
            self.save_x87_control(gva, mnemonic)?;
            self.area_write(gva, ST)?;
        }
        if written & SSE != 0 {
            self.area_write(gva, self.reachable(XMM))?;
        }
        if written & AVX != 0 {
            self.area_write(gva, self.reachable(YMM_HIGH))?;
        }
        Ok(())
    }

    /// The part of a register file that the mode reaches: half of it outside of 64-bit mode.
    fn reachable(&self, mut range: std::ops::Range<usize>) -> std::ops::Range<usize> {
        if !self.state.is_64bit() {
            range.end -= range.len() / 2;
        }
        range
    }

    /// Without REX.W the pointers are 32-bit offsets with selectors.
    fn save_x87_control(&mut self, gva: Gva, mnemonic: Mnemonic) -> Result<(), Abort> {
        let bytes = self
            .fpu
            .control_to_save(self.offer.x87, layout_of(mnemonic));
        let privilege = self.state.explicit_privilege();
        self.memory.write(gva, &bytes, privilege)
    }

    /// `XRSTOR`, `XRSTORS`.
    pub(super) fn xrstor(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_xsave(instruction)?;
        let gva = self.xsave_area(instruction, Want::Read)?;
        let asked = self.state.edx_eax() & self.state.xcr0;
        let mut area = [0; AREA];
        let (first, extended) = area.split_at_mut(EXTENDED_OFFSET);
        let privilege = self.state.explicit_privilege();
        self.memory.read(gva, first, privilege)?;
        let only_compacted = matches!(
            instruction.mnemonic(),
            Mnemonic::Xrstors | Mnemonic::Xrstors64
        );
        let format = self.checked_header(first)?;
        if only_compacted && format == Format::Standard {
            return Err(general());
        }
        if asked & qword(first, XSTATE_BV_OFFSET) & AVX != 0 {
            let at = gva.wrapping_add(EXTENDED_OFFSET as u64);
            self.memory.read(at, extended, privilege)?;
        }
        self.restore(&area, asked, format, instruction.mnemonic())?;
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    fn checked_header(&self, area: &[u8]) -> Result<Format, Abort> {
        let present = qword(area, XSTATE_BV_OFFSET);
        let compacted = qword(area, XCOMP_BV_OFFSET);
        let reserved = &area[XCOMP_BV_OFFSET + 8..LEGACY_SIZE + HEADER_SIZE];
        let xcr0 = self.state.xcr0;
        if compacted & XCOMP_BV_COMPACTED == 0 {
            let clean = compacted == 0 && reserved[..8].iter().all(|&byte| byte == 0);
            return if clean && present & !xcr0 == 0 {
                Ok(Format::Standard)
            } else {
                Err(general())
            };
        }
        let listed = compacted & !XCOMP_BV_COMPACTED;
        let legal = self.offer.instructions.contains(Instructions::XSAVEC)
            && listed & !xcr0 == 0
            && present & !listed == 0
            && reserved.iter().all(|&byte| byte == 0);
        if legal {
            Ok(Format::Compacted)
        } else {
            Err(general())
        }
    }

    fn restore(
        &mut self,
        area: &[u8; AREA],
        asked: u64,
        format: Format,
        mnemonic: Mnemonic,
    ) -> Result<(), Abort> {
        let present = qword(area, XSTATE_BV_OFFSET) & asked;
        let takes_mxcsr = match format {
            Format::Standard => asked & (SSE | AVX) != 0,
            Format::Compacted => present & SSE != 0,
        };
        let mxcsr = qword(area, MXCSR_OFFSET) as u32;
        if takes_mxcsr && mxcsr & !mxcsr_mask() != 0 {
            return Err(general());
        }
        if takes_mxcsr {
            self.fpu.set_mxcsr(mxcsr);
        } else if asked & SSE != 0 {
            self.fpu.set_mxcsr(MXCSR_INIT);
        }
        for (component, ranges) in [
            (X87, &[X87_CONTROL, ST][..]),
            (SSE, &[XMM][..]),
            (AVX, &[YMM_HIGH][..]),
        ] {
            if asked & component == 0 {
                continue;
            }
            for range in ranges {
                let range = match component {
                    X87 => range.clone(),
                    _ => self.reachable(range.clone()),
                };
                let target = &mut self.fpu.bytes_mut()[range.clone()];
                if present & component == 0 {
                    target.fill(0);
                } else {
                    target.copy_from_slice(&area[range]);
                }
            }
        }
        self.finish_x87(asked, present, mnemonic);
        let bv = self.fpu.xstate_bv() & !asked | present;
        self.fpu.set_xstate_bv(bv);
        Ok(())
    }

    fn finish_x87(&mut self, asked: u64, present: u64, mnemonic: Mnemonic) {
        if asked & X87 == 0 {
            return;
        }
        let image = self.fpu.bytes_mut();
        if present & X87 == 0 {
            image[..2].copy_from_slice(&FCW_INIT.to_le_bytes());
        }
        self.fpu.loaded_pointers(layout_of(mnemonic));
    }
}
