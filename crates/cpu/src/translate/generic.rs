//! Instructions that run as they are, with registers renamed and the memory operand redirected.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::address::segment_of;
use super::form::{Form, MemoryUse, Place, Traits};
use super::registers::{GUEST_RCX, GUEST_RSP, Home, home, is_high_byte, number, slot};
use super::window::Role;
use super::{Block, SCRATCH, T0, T1, Use};
use crate::emit::asm::Width;
use crate::emit::{Mem, Operands, Raw, Reg, Rm};
use crate::system::Vendor;

/// Whether the instruction has a memory operand in `ModRM`.
#[inline]
pub(super) fn has_memory(instruction: &Instruction) -> bool {
    // Operands that aren't there count as registers. No branch would be foretold.
    (instruction.op0_kind() == OpKind::Memory)
        | (instruction.op1_kind() == OpKind::Memory)
        | (instruction.op2_kind() == OpKind::Memory)
        | (instruction.op3_kind() == OpKind::Memory)
        | (instruction.op4_kind() == OpKind::Memory)
}

/// The alignment that a memory operand must have: 1 where any will do (SDM 1, table 15-6).
pub(super) fn memory_alignment(instruction: &Instruction) -> u8 {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Cmpxchg16b | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => 16,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => instruction.memory_size().size() as u8,
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpistri
        | M::Pcmpistrm
        | M::Pcmpestri64
        | M::Pcmpestrm64
        | M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => 1,
        _ => {
            let vector = instruction.memory_size().size() == 16
                && instruction.code().encoding() == iced_x86::EncodingKind::Legacy
                && (0..instruction.op_count()).any(|i| {
                    let register = instruction.op_register(i);
                    register.is_xmm() || register.is_mm()
                });
            if vector { 16 } else { 1 }
        }
    }
}

/// Which host registers beyond the operands' own an instruction needs or changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Implicit {
    None,
    /// CL or ECX:EBX, RCX:RBX are read.
    ReadsRcx,
    /// The index that a string comparison computes.
    WritesRcx,
}

fn implicit(instruction: &Instruction, form: &Form) -> Implicit {
    match instruction.mnemonic() {
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => Implicit::ReadsRcx,
        Mnemonic::Pcmpestri
        | Mnemonic::Pcmpistri
        | Mnemonic::Vpcmpestri
        | Mnemonic::Vpcmpistri
        | Mnemonic::Pcmpestri64
        | Mnemonic::Vpcmpestri64 => Implicit::WritesRcx,
        _ if form.uses_cl => Implicit::ReadsRcx,
        _ => Implicit::None,
    }
}

/// A register operand on its way through a scratch register.
#[derive(Clone, Copy, Debug)]
struct Through {
    guest: u8,
    scratch: Reg,
    written: bool,
}

impl Block<'_> {
    /// Translates an instruction that needs no more than other operands.
    pub(super) fn generic(&mut self, instruction: &Instruction, form: &Form, bytes: &[u8]) {
        let memory = has_memory(instruction);
        if memory && form.memory == MemoryUse::Address {
            // Prefetches and long NOPs.
            return;
        }
        if memory && form.traits.intersects(Traits::X87 | Traits::MMX) {
            self.waits = super::x87::waits(instruction, bytes);
        }
        let named = self.forms.named(instruction, form);
        let high = named.high;
        let implicit = implicit(instruction, form);
        let moves = memory || named.elsewhere || implicit != Implicit::None;
        if !moves && !high && self.mode.is_64() {
            // Every register is at home.
            self.asm.bytes(bytes);
            return;
        }
        let raw = self.parse(instruction, bytes);
        let raw = &raw;
        let operand = memory.then(|| self.memory_operand(instruction, form.memory));
        if implicit == Implicit::ReadsRcx {
            self.asm.mov(Width::B64, SCRATCH, GUEST_RCX);
        }
        if high {
            self.with_high_byte(instruction, form, raw, operand);
        } else {
            self.with_registers(instruction, form, raw, operand, implicit);
        }
        if implicit == Implicit::WritesRcx {
            self.asm.mov(Width::B64, GUEST_RCX, SCRATCH);
        }
    }

    fn memory_operand(&mut self, instruction: &Instruction, usage: MemoryUse) -> Mem {
        let usage = match usage {
            MemoryUse::Write => Use::Write,
            MemoryUse::WriteOnly => Use::WriteOnly,
            _ => Use::Read,
        };
        if let Some(m) = self.loop_operand(instruction, usage) {
            return m;
        }
        let size = match instruction.code() {
            // AMD's CPUs read as much as for the other sizes.
            Code::Movsxd_r16_rm16 if self.vendor == Vendor::Amd => 4,
            _ => (instruction.memory_size().size() as u32).max(1),
        };
        let segment = segment_of(instruction, self.mode);
        if self.role != Role::None
            && let Home::Host(base) = home(number(instruction.memory_base()))
        {
            let disp = instruction.memory_displacement64() as i32;
            if let Some(m) = self.shared(base, disp, size, usage, segment) {
                return m;
            }
        }
        let address = self.linear(instruction, size, usage);
        self.access(address, size, usage, segment)
    }

    /// The instruction with registers renamed; those that live in the frame go through scratch
    /// registers.
    fn with_registers(
        &mut self,
        instruction: &Instruction,
        form: &Form,
        raw: &Raw,
        mut operand: Option<Mem>,
        implicit: Implicit,
    ) {
        let mut operands = Operands::default();
        let mut through: [Option<Through>; 4] = [None; 4];
        let mut free = Scratch::new(operand.is_some(), implicit);
        if operand.is_some() && free.is_short(spilled(instruction, form)) {
            self.asm.lea(
                Width::B64,
                T0,
                Mem::indexed(operand.and_then(|m| m.base).unwrap_or(T0), T1, 0, 0),
            );
            operand = Some(Mem::base(T0, 0));
            free.give(T1);
        }
        for (field, through) in form.fields().zip(&mut through) {
            let register = instruction.op_register(u32::from(field.operand));
            if instruction.op_kind(u32::from(field.operand)) != OpKind::Register {
                continue;
            }
            let guest = number(register);
            let host = match home(guest) {
                Home::Host(reg) => reg,
                Home::Frame(_) => {
                    let scratch = free.take();
                    if field.needs_old() {
                        self.asm.load(Width::B64, scratch, slot(guest));
                    }
                    *through = Some(Through {
                        guest,
                        scratch,
                        written: field.written,
                    });
                    scratch
                }
            };
            operands.needs_rex |= field.bytes == 1 && host.0 >= 4;
            place(&mut operands, field.place, host);
        }
        if let Some(m) = operand {
            operands.rm = Some(Rm::Mem(m));
        }
        raw.emit(self.asm, operands);
        // The first operand last: it is the one that stays where two name the same register (XADD).
        for through in through.iter().rev().flatten().filter(|t| t.written) {
            self.asm
                .store(Width::B64, slot(through.guest), through.scratch);
        }
    }

    /// An instruction with AH, CH, DH or BH as an operand. It has no REX prefix, so all its registers
    /// are among the first eight; but those of the host that stand for memory, rcx and rsp need one.
    fn with_high_byte(
        &mut self,
        instruction: &Instruction,
        form: &Form,
        raw: &Raw,
        operand: Option<Mem>,
    ) {
        match operand {
            None => self.high_byte_registers(instruction, form, raw),
            Some(m) => self.high_byte_memory(instruction, form, raw, m),
        }
    }

    fn high_byte_registers(&mut self, instruction: &Instruction, form: &Form, raw: &Raw) {
        let uses = |wanted: u8, written: bool| {
            form.fields().any(|f| {
                let register = instruction.op_register(u32::from(f.operand));
                register != Register::None && number(register) == wanted && (!written || f.written)
            })
        };
        let mut sources = form
            .fields()
            .map(|f| instruction.op_register(u32::from(f.operand)));
        if uses(4, false) && sources.any(|r| r == Register::CH) {
            self.ch_to_stack_pointer(instruction, form, raw);
            return;
        }
        // The guest's rcx, or its rsp (as the target of MOVZX and MOVSX), visits the host's rcx.
        let visitor = if uses(4, false) { 4 } else { 1 };
        let visits = uses(visitor, false);
        if visits {
            let from = self.value_in(visitor, SCRATCH);
            self.asm.mov(Width::B64, SCRATCH, from);
        }
        let mut operands = Operands::default();
        for field in form.fields() {
            let register = instruction.op_register(u32::from(field.operand));
            if register == Register::None {
                continue;
            }
            if number(register) == visitor && !is_high_byte(register) {
                place(&mut operands, field.place, SCRATCH);
            }
        }
        raw.emit(self.asm, operands);
        if visits && uses(visitor, true) {
            self.assign(Width::B64, visitor, SCRATCH);
        }
    }

    /// `MOVZX`, `MOVSX` and `CRC32` from CH to the stack pointer: both would visit the host's rcx.
    fn ch_to_stack_pointer(&mut self, instruction: &Instruction, form: &Form, raw: &Raw) {
        self.high_byte_to_cl(1);
        let mut operands = Operands::default();
        for field in form.fields() {
            let register = instruction.op_register(u32::from(field.operand));
            let host = if is_high_byte(register) {
                SCRATCH
            } else {
                GUEST_RSP
            };
            place(&mut operands, field.place, host);
        }
        raw.emit(self.asm, operands);
    }

    fn high_byte_memory(&mut self, instruction: &Instruction, form: &Form, raw: &Raw, m: Mem) {
        let Some(field) = form.fields().find(|f| f.place == Place::Reg) else {
            return;
        };
        let guest = number(instruction.op_register(u32::from(field.operand)));
        self.high_byte_to_cl(guest);
        let operands = Operands {
            reg: Some(SCRATCH.0),
            rm: Some(Rm::Mem(m)),
            ..Operands::default()
        };
        raw.emit(self.asm, operands);
        if field.written {
            self.cl_to_high_byte(guest);
        }
    }

    /// `movzx ecx, ah` and the like.
    pub(super) fn high_byte_to_cl(&mut self, guest: u8) {
        if guest == 1 {
            self.asm.mov(Width::B64, SCRATCH, GUEST_RCX);
        }
        self.asm.bytes(&[0x0f, 0xb6, 0xc8 | 4 | guest]);
    }

    /// `mov ah, cl` and the like.
    fn cl_to_high_byte(&mut self, guest: u8) {
        if guest == 1 {
            self.asm.xchg(Reg::RAX, GUEST_RCX);
            self.asm.bytes(&[0x88, 0xcc]);
            self.asm.xchg(Reg::RAX, GUEST_RCX);
        } else {
            self.asm.bytes(&[0x88, 0xc8 | 4 | guest]);
        }
    }
}

fn place(operands: &mut Operands, place: Place, host: Reg) {
    match place {
        Place::Reg => operands.reg = Some(host.0),
        Place::Rm => operands.rm = Some(Rm::Reg(host)),
        Place::Vvvv => operands.vvvv = Some(host.0),
        Place::Opcode => operands.opcode_reg = Some(host.0),
    }
}

/// How many register operands live in the frame.
fn spilled(instruction: &Instruction, form: &Form) -> usize {
    form.fields()
        .filter(|f| {
            let register = instruction.op_register(u32::from(f.operand));
            register != Register::None && matches!(home(number(register)), Home::Frame(_))
        })
        .count()
}

/// The scratch registers that are free for operands.
struct Scratch {
    free: [Option<Reg>; 3],
}

impl Scratch {
    fn new(memory: bool, implicit: Implicit) -> Self {
        let rcx = (implicit == Implicit::None).then_some(SCRATCH);
        if memory {
            Self {
                free: [rcx, None, None],
            }
        } else {
            Self {
                free: [rcx, Some(T0), Some(T1)],
            }
        }
    }

    fn is_short(&self, wanted: usize) -> bool {
        self.free.iter().flatten().count() < wanted
    }

    fn give(&mut self, reg: Reg) {
        self.free[2] = Some(reg);
    }

    fn take(&mut self) -> Reg {
        self.free
            .iter_mut()
            .find_map(Option::take)
            .expect("no instruction has more register operands than there are scratch registers")
    }
}
