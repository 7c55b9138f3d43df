//! System instructions that are short: `CPUID`, `HLT`, TLB and cache control, `MONITOR`, hypercalls,
//! software interrupts, `BOUND`, XCR0, PKRU.

use addr::Gva;
use iced_x86::{Instruction, Mnemonic, OpKind};
use x86::control::Cr4;
use x86::rflags;
use x86::vector;
use x86::xstate::xcr0_is_valid;

use super::deliver::{Delivery, Origin};
use super::fault::{general, undefined};
use super::offer::Instructions;
use super::operand::{Want, address_mask, effective_address, linear};
use super::{Abort, Context, Effects, Flush, Next, PendingExit};
use crate::platform::{Handled, HypercallInstruction, Refusal};
use crate::state::gpr;
use crate::{Exception, Exit};

impl Context<'_> {
    /// `CPUID`.
    pub(super) fn cpuid(&mut self, instruction: &Instruction) -> Next {
        let (leaf, subleaf) = (
            self.state.gpr[gpr::RAX] as u32,
            self.state.gpr[gpr::RCX] as u32,
        );
        let result = self.platform.cpuid(self.state, leaf, subleaf);
        self.state.rip = self.next_rip(instruction);
        let registers = &mut self.state.gpr;
        registers[gpr::RAX] = u64::from(result.eax);
        registers[gpr::RBX] = u64::from(result.ebx);
        registers[gpr::RCX] = u64::from(result.ecx);
        registers[gpr::RDX] = u64::from(result.edx);
        Next::Sequential
    }

    /// `HLT`: leaves unless the platform waits. RIP is behind the instruction in either case.
    pub(super) fn hlt(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        self.state.rip = self.next_rip(instruction);
        self.state.rflags &= !rflags::RF;
        // HLT is the instruction that the shadow covers; it wakes up with interrupts allowed.
        self.state.events.sti_shadow = false;
        self.state.events.mov_ss_shadow = false;
        self.effects |= Effects::EVENTS | Effects::DEBUG;
        let traps = self.pending.debug != 0 || self.state.flags_have(rflags::TF);
        if traps || self.has_wakeup() {
            return Ok(Next::Sequential);
        }
        match self.platform.halt(self.state) {
            Handled::Yes => Ok(Next::Sequential),
            Handled::No => Err(Exit::Halt.into()),
        }
    }

    /// `INVD`, `WBINVD`: no cache is ours to flush.
    pub(super) fn flush_caches(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    /// `INVLPG`.
    pub(super) fn invlpg(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        self.require_cpl0()?;
        let offset = effective_address(self.state, instruction);
        let base = if self.state.is_64bit() {
            match instruction.memory_segment() {
                register @ (iced_x86::Register::FS | iced_x86::Register::GS) => {
                    self.state.segments.get(register).base
                }
                _ => 0,
            }
        } else {
            self.state.segments.get(instruction.memory_segment()).base
        };
        self.state.rip = self.next_rip(instruction);
        let gva = base.wrapping_add(offset);
        let wide = self.state.is_64bit();
        if !wide || self.state.is_canonical(gva) {
            self.memory.flush(Flush::Page(Gva::new(if wide {
                gva
            } else {
                gva & 0xffff_ffff
            })));
        }
        Ok(Next::Sequential)
    }

    /// `INVPCID`.
    pub(super) fn invpcid(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.offer.instructions.contains(Instructions::INVPCID)
            || instruction.op1_kind() != OpKind::Memory
        {
            return Err(undefined());
        }
        self.require_cpl0()?;
        let kind = self.state.register(instruction.op0_register());
        let first = self.operand_address(instruction, 0, 16, Want::Read)?;
        let mut bytes = [0; 16];
        let privilege = self.state.explicit_privilege();
        self.memory.read(first, &mut bytes, privilege)?;
        let raw = u128::from_le_bytes(bytes);
        let (pcid, address) = (raw as u64, (raw >> 64) as u64);
        let flush = self.invpcid_flush(kind, pcid, address)?;
        self.state.rip = self.next_rip(instruction);
        self.memory.flush(flush);
        Ok(Next::Sequential)
    }

    fn invpcid_flush(&self, kind: u64, pcid: u64, address: u64) -> Result<Flush, Abort> {
        let enabled = self.state.cr4_has(Cr4::PCIDE);
        let bad_pcid = pcid >> 12 != 0 || kind < 2 && pcid != 0 && !enabled;
        if kind > 3 || bad_pcid || kind == 0 && !self.state.is_canonical(address) {
            return Err(general());
        }
        Ok(match kind {
            0 => Flush::PcidPage(pcid as u16, Gva::new(address)),
            1 => Flush::Pcid(pcid as u16),
            2 => Flush::All,
            _ => Flush::NonGlobal,
        })
    }

    /// `MONITOR` and `MWAIT`: where offered, a pause. The write that is waited for can't be seen, and
    /// waking up early is allowed.
    pub(super) fn monitor(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if self.state.cpl() > 0 || !self.platform.offers_monitor(self.state) {
            return Err(undefined());
        }
        if self.state.gpr[gpr::RCX] as u32 > u32::from(instruction.mnemonic() == Mnemonic::Mwait) {
            return Err(general());
        }
        if instruction.mnemonic() == Mnemonic::Monitor {
            let mask = address_mask(instruction);
            let offset = self.state.gpr[gpr::RAX] & mask;
            let gva = linear(
                self.state,
                instruction.memory_segment(),
                offset,
                1,
                Want::Read,
            )?;
            self.load(gva, 1)?;
        }
        self.state.rip = self.next_rip(instruction);
        self.effects |= Effects::EVENTS;
        Ok(Next::Sequential)
    }

    /// `VMCALL`, `VMMCALL`.
    pub(super) fn hypercall(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
        const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];
        let next = self.next_rip(instruction);
        let rip = self.state.rip;
        let bytes = if instruction.mnemonic() == Mnemonic::Vmcall {
            VMCALL
        } else {
            VMMCALL
        };
        match self.platform.hypercall_instruction(bytes) {
            HypercallInstruction::Works => {}
            HypercallInstruction::Rewritten(bytes) => {
                let privilege = self.state.explicit_privilege();
                self.memory.write(self.linear_rip(), &bytes, privilege)?;
            }
            HypercallInstruction::Undefined => return Err(undefined()),
        }
        match self.platform.hypercall(self.state) {
            Ok(result) => {
                self.state.gpr[gpr::RAX] = result;
                self.state.rip = next;
                self.effects |= Effects::EVENTS;
                Ok(Next::Sequential)
            }
            Err(Refusal::Exception(exception)) => Err(exception.into()),
            Err(Refusal::Exit(exit)) => {
                if matches!(exit, Exit::Hypercall(_)) {
                    self.pending.exit = PendingExit::Hypercall { rip, next };
                }
                Err(exit.into())
            }
        }
    }

    /// `INT n`, `INT3`, `INTO`, `INT1`.
    pub(super) fn interrupt(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let (vector, origin) = match instruction.mnemonic() {
            Mnemonic::Int => (instruction.immediate8(), Origin::Interrupt),
            Mnemonic::Int3 => (vector::BP, Origin::Exception),
            Mnemonic::Into => (vector::OF, Origin::Exception),
            _ => (vector::DB, Origin::External),
        };
        let next = self.next_rip(instruction);
        if vector == vector::OF && origin == Origin::Exception && !self.overflows()? {
            self.state.rip = next;
            return Ok(Next::Sequential);
        }
        if vector == vector::BP
            && origin == Origin::Exception
            && self.guest_debug.enabled
            && self.guest_debug.software_breakpoints
        {
            return Err(self.debug_exit(vector::BP, 0));
        }
        let delivery = Delivery {
            vector,
            error_code: None,
            origin,
        };
        self.software_interrupt(delivery, next)?;
        Ok(Next::Jump)
    }

    /// Whether `INTO` traps; it doesn't exist in 64-bit mode.
    fn overflows(&self) -> Result<bool, Abort> {
        if self.state.is_64bit() {
            return Err(undefined());
        }
        Ok(self.state.flags_have(rflags::OF))
    }

    /// `BOUND`.
    pub(super) fn bound(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if instruction.op1_kind() != OpKind::Memory {
            return Err(undefined());
        }
        let size = instruction.op0_register().size() as u64;
        let low = self.operand_address(instruction, 0, size, Want::Read)?;
        let lower = self.load(low, size)?;
        let high = self.operand_address(instruction, size, size, Want::Read)?;
        let shift = 64 - 8 * size as u32;
        let signed = |value: u64| (value << shift) as i64 >> shift;
        let index = signed(self.state.register(instruction.op0_register()));
        let low = signed(lower);
        let high = signed(self.load(high, size)?);
        if index < low || index > high {
            return Err(Exception::plain(vector::BR).into());
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    /// `XGETBV`. With ECX 1 it tells which components are in use.
    pub(super) fn xgetbv(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.cr4_has(Cr4::OSXSAVE) {
            return Err(undefined());
        }
        let has_xgetbv1 = self.offer.instructions.contains(Instructions::XGETBV1);
        let value = match self.state.gpr[gpr::RCX] as u32 {
            0 => self.state.xcr0,
            1 if has_xgetbv1 => self.state.xcr0 & self.fpu.xstate_bv(),
            _ => return Err(general()),
        };
        self.state.set_edx_eax(value);
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }

    /// `XSETBV`.
    pub(super) fn xsetbv(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.cr4_has(Cr4::OSXSAVE) {
            return Err(undefined());
        }
        self.require_cpl0()?;
        let value = self.state.edx_eax();
        let legal = self.state.gpr[gpr::RCX] as u32 == 0 && xcr0_is_valid(value, self.offer.xcr0);
        if !legal {
            return Err(general());
        }
        self.state.rip = self.next_rip(instruction);
        self.state.xcr0 = value;
        self.effects |= Effects::FPU;
        Ok(Next::Sequential)
    }

    /// `RDPKRU`, `WRPKRU`.
    pub(super) fn pkru(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        if !self.state.cr4_has(Cr4::PKE) {
            return Err(undefined());
        }
        let writes = instruction.mnemonic() == Mnemonic::Wrpkru;
        let rdx = self.state.gpr[gpr::RDX] as u32;
        if self.state.gpr[gpr::RCX] as u32 != 0 || writes && rdx != 0 {
            return Err(general());
        }
        if writes {
            self.state.pkru = self.state.gpr[gpr::RAX] as u32;
            self.effects |= Effects::PKRU | Effects::PAGING;
            self.memory.paging_changed(self.state);
        } else {
            self.state.set_edx_eax(u64::from(self.state.pkru));
        }
        self.state.rip = self.next_rip(instruction);
        Ok(Next::Sequential)
    }
}
