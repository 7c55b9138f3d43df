//! Instructions on descriptor tables and their registers, and those that ask about descriptors
//! (SDM 2: `LGDT`, `SGDT`, `LLDT`, `LTR`, `LAR`, `LSL`, `VERR`, `ARPL`; SDM 3A, 6.10).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86::descriptor::{Descriptor, Gate, Selector, attributes, system_type};
use x86::rflags;
use x86::vector;

use super::fault::{general, general_at, naming, undefined};
use super::operand::Want;
use super::segment::null_segment;
use super::table::segment_of;
use super::{Abort, Context, Next};
use crate::state::{Segment, TableRegister};

impl Context<'_> {
    /// `LGDT`, `LIDT`.
    pub(super) fn load_table(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let len = if self.state.is_64bit() { 10 } else { 6 };
        let gva = self.operand_address(instruction, 0, len, Want::Read)?;
        let mut bytes = [0; 16];
        let privilege = self.state.explicit_privilege();
        self.memory
            .read(gva, &mut bytes[..len as usize], privilege)?;
        let raw = u128::from_le_bytes(bytes);
        let narrow = matches!(
            instruction.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
        );
        let base = (raw >> 16) as u64 & if narrow { 0x00ff_ffff } else { u64::MAX };
        if self.state.is_64bit() && !self.state.is_canonical(base) {
            return Err(general());
        }
        let table = TableRegister {
            base,
            limit: raw as u16,
        };
        if instruction.mnemonic() == Mnemonic::Lgdt {
            self.state.gdtr = table;
        } else {
            self.state.idtr = table;
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `SGDT`, `SIDT`.
    pub(super) fn store_table(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_umip_clear()?;
        let table = if instruction.mnemonic() == Mnemonic::Sgdt {
            self.state.gdtr
        } else {
            self.state.idtr
        };
        let raw = u128::from(table.base) << 16 | u128::from(table.limit);
        let len = if self.state.is_64bit() { 10 } else { 6 };
        let gva = self.operand_address(instruction, 0, len, Want::Write)?;
        let privilege = self.state.explicit_privilege();
        self.memory
            .write(gva, &raw.to_le_bytes()[..len as usize], privilege)?;
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    /// `#UD` where segment registers don't name descriptors.
    fn require_descriptors(&self) -> Result<(), Abort> {
        if self.state.has_real_segments() {
            Err(undefined())
        } else {
            Ok(())
        }
    }

    /// `SLDT`, `STR`.
    pub(super) fn store_selector(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        self.require_umip_clear()?;
        let segment = if instruction.mnemonic() == Mnemonic::Sldt {
            &self.state.segments.ldtr
        } else {
            &self.state.segments.tr
        };
        let selector = segment.selector;
        self.write_operand(instruction, u64::from(selector), 2)?;
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    /// `LLDT`.
    pub(super) fn lldt(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let selector = Selector(self.read_operand(instruction, 0, 2)? as u16);
        let segment = self.checked_ldt(selector, vector::GP, vector::NP)?;
        self.state.segments.ldtr = segment;
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// What LDTR holds after this selector is loaded; faults by the given vectors.
    pub(super) fn checked_ldt(
        &mut self,
        selector: Selector,
        wrong: u8,
        absent: u8,
    ) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        if selector.is_local() {
            return Err(naming(wrong, selector));
        }
        let wide = self.read_system_descriptor(selector, wrong)?;
        if !is_system_type(wide, &[system_type::LDT]) {
            return Err(naming(wrong, selector));
        }
        if !wide.descriptor().is_present() {
            return Err(naming(absent, selector));
        }
        Ok(system_segment(selector, wide))
    }

    /// The descriptor of an LDT or TSS, in long mode with the upper half of its base.
    pub(super) fn read_system_descriptor(
        &mut self,
        selector: Selector,
        vector: u8,
    ) -> Result<Gate, Abort> {
        if self.state.is_long_active() {
            self.read_wide_descriptor(selector, vector)
        } else {
            let low = self.read_descriptor(selector, vector)?.0;
            Ok(Gate { low, high: 0 })
        }
    }

    /// `LTR`.
    pub(super) fn ltr(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let selector = Selector(self.read_operand(instruction, 0, 2)? as u16);
        if selector.is_null() {
            return Err(general());
        }
        if selector.is_local() {
            return Err(general_at(selector));
        }
        let wide = self.read_system_descriptor(selector, vector::GP)?;
        let available: &[u8] = if self.state.is_long_active() {
            &[system_type::TSS_AVAILABLE]
        } else {
            &[system_type::TSS_AVAILABLE, system_type::TSS16_AVAILABLE]
        };
        if !is_system_type(wide, available) {
            return Err(general_at(selector));
        }
        if !wide.descriptor().is_present() {
            return Err(naming(vector::NP, selector));
        }
        let mut segment = system_segment(selector, wide);
        if self.state.is_long_active() && !self.state.is_canonical(segment.base) {
            return Err(general_at(selector));
        }
        self.mark_busy(selector, wide.descriptor())?;
        segment.attributes |= u16::from(system_type::BUSY);
        self.state.segments.tr = segment;
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// The descriptor that `LAR`, `LSL`, `VERR`, `VERW` ask about, where its type is among
    /// `system_types` or code or data, and CPL and RPL let it be seen.
    fn visible_descriptor(
        &mut self,
        selector: Selector,
        system_types: &[u8],
    ) -> Result<Option<Descriptor>, Abort> {
        if selector.is_null() {
            return Ok(None);
        }
        let Some(descriptor) = self.find_descriptor(selector)? else {
            return Ok(None);
        };
        let known = !descriptor.is_system() || system_types.contains(&descriptor.kind());
        let visible =
            descriptor.is_conforming() || descriptor.dpl() >= self.state.cpl().max(selector.rpl());
        Ok((known && visible).then_some(descriptor))
    }

    fn set_zero_flag(&mut self, value: Option<()>) {
        self.state
            .put_flags(rflags::ZF, if value.is_some() { rflags::ZF } else { 0 });
    }

    /// `LAR`, `LSL`.
    pub(super) fn load_attributes(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        let next = self.next_rip(instruction);
        let selector = Selector(self.read_operand(instruction, 1, 2)? as u16);
        let is_lar = instruction.mnemonic() == Mnemonic::Lar;
        let types: &[u8] = match (is_lar, self.state.is_long_active()) {
            (true, false) => &[1, 2, 3, 4, 5, 9, 11, 12],
            (true, true) => &[2, 9, 11, 12],
            (false, false) => &[1, 2, 3, 9, 11],
            (false, true) => &[2, 9, 11],
        };
        let found = self.visible_descriptor(selector, types)?;
        if let Some(descriptor) = found {
            let value = if is_lar {
                descriptor.0 >> 32 & 0x00ff_ff00
            } else {
                u64::from(descriptor.limit())
            };
            self.state.set_register(instruction.op0_register(), value);
        }
        self.set_zero_flag(found.map(|_| ()));
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `VERR`, `VERW`.
    pub(super) fn verify_segment(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        let next = self.next_rip(instruction);
        let selector = Selector(self.read_operand(instruction, 0, 2)? as u16);
        let found = self.visible_descriptor(selector, &[])?;
        let good = found.filter(|descriptor| match instruction.mnemonic() {
            Mnemonic::Verr => descriptor.is_readable(),
            _ => descriptor.is_writable(),
        });
        self.set_zero_flag(good.map(|_| ()));
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `ARPL`.
    pub(super) fn arpl(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_descriptors()?;
        let next = self.next_rip(instruction);
        let target = Selector(self.read_operand(instruction, 0, 2)? as u16);
        let source = Selector(self.state.register(instruction.op1_register()) as u16);
        let raise = target.rpl() < source.rpl();
        if raise {
            self.write_short(instruction, target.with_rpl(source.rpl()).0)?;
        }
        self.set_zero_flag(raise.then_some(()));
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    fn write_short(&mut self, instruction: &Instruction, value: u16) -> Result<(), Abort> {
        if instruction.op0_kind() == OpKind::Register {
            let register = instruction.op0_register();
            let old = self.state.register(register);
            self.state
                .set_register(register, old & !0xffff | u64::from(value));
            return Ok(());
        }
        self.write_operand(instruction, u64::from(value), 2)
    }
}

fn is_system_type(wide: Gate, types: &[u8]) -> bool {
    let descriptor = wide.descriptor();
    // In long mode the type field of the upper half must be zero (SDM 3A, figure 8-4).
    descriptor.is_system()
        && types.contains(&descriptor.kind())
        && wide.high >> 40 & u64::from(attributes::TYPE | attributes::S) == 0
}

fn system_segment(selector: Selector, wide: Gate) -> Segment {
    let mut segment = segment_of(selector, wide.descriptor());
    segment.base |= wide.high << 32;
    segment
}
