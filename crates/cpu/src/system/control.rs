//! Control registers (SDM 3A, 2.5, 5.10.4.1 and 11.8.5; SDM 2, `MOV` control registers).

use addr::Gpa;
use iced_x86::Instruction;
use x86::control::{CR3_NO_FLUSH, CR3_PCID, Cr0, Cr4, Efer};
use x86::descriptor::{attributes, system_type};

use super::fault::{general, undefined};
use super::{Abort, Context, Effects, Flush, Next};
use crate::CpuState;

/// Bits of CR0 that can be written; the others read as zero.
const CR0_KNOWN: u64 = Cr0::PE
    .union(Cr0::MP)
    .union(Cr0::EM)
    .union(Cr0::TS)
    .union(Cr0::ET)
    .union(Cr0::NE)
    .union(Cr0::WP)
    .union(Cr0::AM)
    .union(Cr0::NW)
    .union(Cr0::CD)
    .union(Cr0::PG)
    .bits();

/// Bits of CR0 that decide whether x87, SSE and AVX instructions fault.
const CR0_FPU: u64 = Cr0::MP.union(Cr0::EM).union(Cr0::TS).union(Cr0::NE).bits();
/// The same of CR4.
const CR4_FPU: u64 = Cr4::OSFXSR
    .union(Cr4::OSXMMEXCPT)
    .union(Cr4::OSXSAVE)
    .bits();
/// Bits of CR4 whose change empties the TLB.
const CR4_FLUSH: u64 = Cr4::PGE
    .union(Cr4::PAE)
    .union(Cr4::PSE)
    .union(Cr4::LA57)
    .bits();
/// Bits of CR4 whose change reloads the PDPTEs.
const CR4_PDPTE: u64 = Cr4::PGE
    .union(Cr4::PAE)
    .union(Cr4::PSE)
    .union(Cr4::SMEP)
    .bits();
/// A present PDPTE's reserved bits below the address (SDM 3A, table 5-8).
const PDPTE_RESERVED: u64 = 0x1e6;

/// Bits of a physical address.
fn physical_mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// Whether this state pages with PDPTEs: PAE paging outside long mode.
fn uses_pdptes(state: &CpuState) -> bool {
    state.cr0_has(Cr0::PG) && state.cr4_has(Cr4::PAE) && !state.is_long_active()
}

impl Context<'_> {
    /// `#GP(0)` unless CPL is 0.
    pub(super) fn require_cpl0(&self) -> Result<(), Abort> {
        if self.state.cpl() == 0 {
            Ok(())
        } else {
            Err(general())
        }
    }

    /// `MOV` from a control register.
    pub(super) fn read_control(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let number = instruction.op1_register().number();
        self.require_cpl0()?;
        require_control(number)?;
        let value = match number {
            0 => self.state.cr0,
            2 => self.state.cr2,
            3 => self.state.cr3,
            4 => self.state.cr4,
            _ => u64::from(self.platform.task_priority()),
        };
        self.state.rip = self.next_rip(instruction);
        self.state.set_register(instruction.op0_register(), value);
        Ok(Next::Sequential)
    }

    /// `MOV` to a control register.
    pub(super) fn write_control(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let number = instruction.op0_register().number();
        self.require_cpl0()?;
        require_control(number)?;
        let value = self.state.register(instruction.op1_register());
        let next = self.next_rip(instruction);
        match number {
            0 => self.set_cr0(value)?,
            2 => self.state.cr2 = value,
            3 => self.set_cr3(value)?,
            4 => self.set_cr4(value)?,
            _ => self.set_cr8(value)?,
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// Writes CR0 with all that hangs on it: protected mode, paging, long mode.
    pub(super) fn set_cr0(&mut self, value: u64) -> Result<(), Abort> {
        let old = self.state.cr0;
        let new = Cr0::from_bits_retain(value & CR0_KNOWN | Cr0::ET.bits());
        if value >> 32 != 0
            || new.contains(Cr0::PG) && !new.contains(Cr0::PE)
            || new.contains(Cr0::NW) && !new.contains(Cr0::CD)
        {
            return Err(general());
        }
        let changed = old ^ new.bits();
        if changed & Cr0::PG.bits() != 0 {
            self.check_paging_switch(new)?;
        }
        if new.contains(Cr0::PG)
            && self.state.cr4_has(Cr4::PAE)
            && !self.state.efer_has(Efer::LME)
            && changed & (Cr0::PG | Cr0::CD | Cr0::NW).bits() != 0
        {
            self.state.pdptrs = self.read_pdptes(self.state.cr3)?;
        }
        self.state.cr0 = new.bits();
        self.after_cr0(changed);
        Ok(())
    }

    fn check_paging_switch(&self, new: Cr0) -> Result<(), Abort> {
        let state = &self.state;
        let legal = if !new.contains(Cr0::PG) {
            !state.is_64bit() && !state.cr4_has(Cr4::PCIDE)
        } else if state.efer_has(Efer::LME) {
            let tss = (state.segments.tr.attributes & attributes::TYPE) as u8;
            let tss16 = matches!(tss, system_type::TSS16_AVAILABLE | system_type::TSS16_BUSY);
            state.cr4_has(Cr4::PAE)
                && state.segments.cs.attributes & attributes::L == 0
                && !(state.is_protected() && tss16)
        } else {
            true
        };
        if legal { Ok(()) } else { Err(general()) }
    }

    fn after_cr0(&mut self, changed: u64) {
        if changed & CR0_FPU != 0 {
            self.effects |= Effects::FPU;
        }
        if changed & Cr0::PE.bits() != 0 {
            self.effects |= Effects::MODE | Effects::SEGMENTS;
        }
        if changed & Cr0::PG.bits() != 0 {
            let active = self.state.cr0_has(Cr0::PG) && self.state.efer_has(Efer::LME);
            let lma = Efer::LMA.bits();
            self.state.msrs.efer = self.state.msrs.efer & !lma | if active { lma } else { 0 };
            self.effects |= Effects::MODE;
        }
        if changed & (Cr0::PG | Cr0::WP | Cr0::PE).bits() != 0 {
            self.paging_changed();
        }
        if changed & Cr0::PG.bits() != 0 {
            self.memory.flush(Flush::All);
        }
    }

    /// Writes CR3, with the flush that goes with it.
    pub(super) fn set_cr3(&mut self, value: u64) -> Result<(), Abort> {
        let keep = value & CR3_NO_FLUSH != 0 && self.state.cr4_has(Cr4::PCIDE);
        let value = if keep { value & !CR3_NO_FLUSH } else { value };
        if self.state.is_long_active() && value & !physical_mask(self.offer.physical_bits) != 0 {
            return Err(general());
        }
        if uses_pdptes(self.state) {
            self.state.pdptrs = self.read_pdptes(value)?;
        }
        self.state.cr3 = value;
        self.paging_changed();
        if !keep {
            self.memory.flush(Flush::CurrentPcid);
        }
        Ok(())
    }

    /// Writes CR4.
    fn set_cr4(&mut self, value: u64) -> Result<(), Abort> {
        let new = Cr4::from_bits_retain(value);
        let changed = self.state.cr4 ^ value;
        let long = self.state.is_long_active();
        let pcide_begins = changed & value & Cr4::PCIDE.bits() != 0;
        if value & !self.offer.cr4 != 0
            || long && !new.contains(Cr4::PAE)
            || long && changed & Cr4::LA57.bits() != 0
            || pcide_begins && (!long || self.state.cr3 & CR3_PCID != 0)
        {
            return Err(general());
        }
        if self.state.cr0_has(Cr0::PG)
            && new.contains(Cr4::PAE)
            && !long
            && changed & CR4_PDPTE != 0
        {
            self.state.pdptrs = self.read_pdptes(self.state.cr3)?;
        }
        self.state.cr4 = value;
        self.after_cr4(changed);
        Ok(())
    }

    fn after_cr4(&mut self, changed: u64) {
        self.paging_changed();
        let pcide_ends = changed & !self.state.cr4 & Cr4::PCIDE.bits() != 0;
        let smep_begins = changed & self.state.cr4 & Cr4::SMEP.bits() != 0;
        if changed & CR4_FLUSH != 0 || pcide_ends || smep_begins {
            self.memory.flush(Flush::All);
        }
        if changed & CR4_FPU != 0 {
            self.effects |= Effects::FPU;
        }
        if changed & Cr4::SMAP.bits() != 0 {
            self.effects |= Effects::ACCESS_RIGHTS | Effects::MODE;
        }
        if changed & (Cr4::DE | Cr4::VME | Cr4::PVI).bits() != 0 {
            self.effects |= Effects::DEBUG;
        }
    }

    fn set_cr8(&mut self, value: u64) -> Result<(), Abort> {
        if value > 15 {
            return Err(general());
        }
        self.platform.set_task_priority(value as u8);
        self.effects |= Effects::EVENTS;
        Ok(())
    }

    fn paging_changed(&mut self) {
        self.effects |= Effects::PAGING;
        self.memory.paging_changed(self.state);
    }

    /// The four PDPTEs that CR3 names, checked (SDM 3A, 5.4.1).
    fn read_pdptes(&mut self, cr3: u64) -> Result<[u64; 4], Abort> {
        let mut bytes = [0; 32];
        self.memory
            .read_physical(Gpa::new(cr3 & 0xffff_ffe0), &mut bytes)?;
        let mut entries = [0; 4];
        let reserved = !physical_mask(self.offer.physical_bits) | PDPTE_RESERVED;
        for (entry, raw) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(raw);
            *entry = u64::from_le_bytes(value);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(general());
            }
        }
        Ok(entries)
    }

    /// `CLTS`.
    pub(super) fn clts(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        self.state.rip = self.next_rip(instruction);
        if self.state.cr0_has(Cr0::TS) {
            self.state.cr0 &= !Cr0::TS.bits();
            self.effects |= Effects::FPU;
        }
        Ok(Next::Sequential)
    }

    /// `LMSW`: PE, MP, EM and TS of CR0; PE can't be cleared.
    pub(super) fn lmsw(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        let next = self.next_rip(instruction);
        let value = self.read_operand(instruction, 0, 2)?;
        let low = self.state.cr0 & Cr0::PE.bits() | value & 0xf;
        self.set_cr0(self.state.cr0 & !0xf | low)?;
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `SMSW`.
    pub(super) fn smsw(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_umip_clear()?;
        let next = self.next_rip(instruction);
        self.write_operand(instruction, self.state.cr0, 2)?;
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// `#GP(0)` where CR4.UMIP keeps user code from system registers.
    pub(super) fn require_umip_clear(&self) -> Result<(), Abort> {
        if self.state.cr4_has(Cr4::UMIP) && self.state.cpl() > 0 {
            return Err(general());
        }
        Ok(())
    }
}

/// `#UD` for control registers that don't exist.
fn require_control(number: usize) -> Result<(), Abort> {
    if matches!(number, 0 | 2 | 3 | 4 | 8) {
        Ok(())
    } else {
        Err(undefined())
    }
}
