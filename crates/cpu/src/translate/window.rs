//! One TLB check for several accesses off one register.
//!
//! A function's prologue and epilogue, and the fields of one structure, are accesses at small
//! distances off a register that doesn't change meanwhile (or, the stack pointer, changes by constants).
//! The first of them checks the whole span: that it lies in one page, for writing if any of them
//! writes. The others use the addend that it left in `t1`.
//!
//! A run ends at the first instruction that needs `t1` itself or is not known well enough. Where the
//! span's check fails the first access is resolved alone, so that it faults as it should; if the span
//! then still fails, the code goes on in a translation without spans ([`Mode::UNSHARED`]). A span that
//! crosses a page does so each time that the code is run (a stack frame, say), so the cold stub of its
//! check then leads to that translation directly (`engine::spans`).

use iced_x86::{FlowControl, Instruction, Mnemonic, Register};

use super::form::{Form, Forms, MemoryUse, Traits};
use super::generic::has_memory;
use super::joins::Joins;
use super::registers::{GUEST_RSP, Home, home, number};
use super::{Block, Mode, Reason, SCRATCH, Span, T0, T1, Use};
use crate::emit::asm::Width;
use crate::emit::{Mem, Reg};

/// The widest span.
pub(super) const WIDEST: i32 = 1024;
/// Distances beyond this are not worth planning for; sums of a block's fit an `i32` with ease.
const FARTHEST: i32 = 1 << 20;

/// A distance, if it is one to plan for.
pub(super) fn distance(value: i64) -> Option<i32> {
    let value = i32::try_from(value).ok()?;
    (-FARTHEST..=FARTHEST).contains(&value).then_some(value)
}

const RSP: u8 = 4;

/// What an instruction has to do with spans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Role {
    /// Nothing: it ends them.
    #[default]
    None,
    /// It begins one.
    First(Span),
    /// It is part of one.
    Member,
}

/// One access off a register.
#[derive(Clone, Copy, Debug)]
struct Access {
    base: u8,
    disp: i32,
    size: i32,
    writes: bool,
}

/// What the planner must know of an instruction.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    access: Option<Access>,
    /// Guest registers that are written, by number.
    written: u16,
    /// How the stack pointer moves.
    stack: i32,
    /// Nothing behind it is in the span.
    last: bool,
}

/// Integer instructions that write nothing but their operands.
pub(super) fn is_plain_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Sub
            | M::Adc
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Nop
            | M::Endbr64
    ) || is_conditional(mnemonic)
}

fn is_conditional(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
            | M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}

/// Vector instructions that move or compute and touch no general register by themselves.
pub(super) fn is_plain_vector(instruction: &Instruction, form: &Form) -> bool {
    use Mnemonic as M;
    let vectors =
        (0..instruction.op_count()).any(|i| instruction.op_register(i).is_vector_register());
    vectors
        && !super::special::runs_in_rust(instruction)
        && !form.uses_cl
        && !matches!(
            instruction.mnemonic(),
            M::Pcmpestri
                | M::Pcmpistri
                | M::Vpcmpestri
                | M::Vpcmpistri
                | M::Pcmpestri64
                | M::Vpcmpestri64
        )
}

fn constant_stack_move(instruction: &Instruction) -> Option<i32> {
    let to_rsp = instruction.op0_register() == Register::RSP && instruction.op_count() == 2;
    if !to_rsp {
        return None;
    }
    match instruction.mnemonic() {
        Mnemonic::Add => distance(instruction.try_immediate(1).ok()? as i64),
        Mnemonic::Sub => distance((instruction.try_immediate(1).ok()? as i64).wrapping_neg()),
        Mnemonic::Lea
            if instruction.memory_base() == Register::RSP
                && instruction.memory_index() == Register::None =>
        {
            distance(instruction.memory_displacement64() as i64)
        }
        _ => None,
    }
}

/// The facts about an instruction that may stand in a span.
#[inline]
fn facts(instruction: &Instruction, forms: &Forms) -> Option<Facts> {
    let form = forms.of(instruction);
    if !form.traits.contains(Traits::NEXT) || form.traits.contains(Traits::STACK) {
        return stack_facts(instruction);
    }
    if form.traits.contains(Traits::SYSTEM) || instruction.has_lock_prefix() {
        return None;
    }
    let known = form
        .traits
        .intersects(Traits::PLAIN_INTEGER | Traits::PLAIN_VECTOR);
    let named = forms.named(instruction, form);
    if !known || form.uses_cl || named.high {
        return None;
    }
    let spilled = named.in_frame;
    let mut facts = Facts {
        written: named.written,
        ..Facts::default()
    };
    if let Some(delta) = constant_stack_move(instruction) {
        facts.written &= !(1 << RSP);
        facts.stack = delta;
    }
    if !has_memory(instruction) {
        return (spilled <= 2).then_some(facts);
    }
    if form.memory == MemoryUse::Address {
        let index = instruction.memory_index();
        let free = index == Register::None || matches!(home(number(index)), Home::Host(_));
        return free.then_some(facts);
    }
    if spilled > 1 {
        return None;
    }
    facts.access = Some(access(instruction, form)?);
    Some(facts)
}

fn access(instruction: &Instruction, form: &Form) -> Option<Access> {
    let base = instruction.memory_base();
    let simple = base.is_gpr64()
        && instruction.memory_index() == Register::None
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS);
    let size = instruction.memory_size().size() as i32;
    if !simple || !(1..=64).contains(&size) || matches!(home(number(base)), Home::Frame(_)) {
        return None;
    }
    Some(Access {
        base: number(base),
        disp: distance(instruction.memory_displacement64() as i64)?,
        size,
        writes: matches!(form.memory, MemoryUse::Write | MemoryUse::WriteOnly),
    })
}

fn stack_facts(instruction: &Instruction) -> Option<Facts> {
    if super::branch::is_side_exit(instruction) {
        return Some(Facts::default());
    }
    let delta = instruction.stack_pointer_increment();
    let push = |last| Facts {
        access: Some(Access {
            base: RSP,
            disp: delta,
            size: -delta,
            writes: true,
        }),
        stack: delta,
        last,
        written: 0,
    };
    let pop = |size: i32, written, last| Facts {
        access: Some(Access {
            base: RSP,
            disp: 0,
            size,
            writes: false,
        }),
        stack: delta,
        last,
        written,
    };
    match instruction.mnemonic() {
        Mnemonic::Push if !has_memory(instruction) => Some(push(false)),
        Mnemonic::Pop if instruction.op0_register().is_gpr64() => {
            let target = number(instruction.op0_register());
            Some(pop(8, 1 << target, target == RSP))
        }
        Mnemonic::Call if instruction.flow_control() == FlowControl::Call => Some(push(true)),
        Mnemonic::Ret => Some(pop(8, 0, true)),
        _ => None,
    }
}

/// Who shares a check with whom in a block.
#[derive(Debug, Default)]
pub(super) struct Plan {
    roles: Vec<Role>,
    facts: Vec<Option<Facts>>,
}

impl Plan {
    /// Works it out.
    pub(super) fn make(
        &mut self,
        instructions: &[Instruction],
        mode: Mode,
        forms: &Forms,
        joins: &Joins,
    ) {
        self.roles.clear();
        self.roles.resize(instructions.len(), Role::None);
        self.facts.clear();
        let all = instructions.iter().map(|i| facts(i, forms));
        self.facts.extend(all);
        if !mode.is_64() || mode.has(Mode::STEP | Mode::BOUNCE | Mode::UNSHARED) {
            return;
        }
        let mut at = 0;
        while at < self.facts.len() {
            at = match self.facts[at] {
                Some(Facts {
                    access: Some(first),
                    ..
                }) => plan_span(&self.facts, at, first, joins, &mut self.roles),
                _ => at + 1,
            };
        }
    }

    /// The general registers that an instruction may write, but for the stack pointer where it moves by
    /// a constant.
    pub(super) fn written(&self, index: usize) -> u16 {
        self.facts[index].map_or(u16::MAX, |facts| facts.written)
    }

    pub(super) fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// The role of an instruction.
    pub(super) fn role(&self, index: usize) -> Role {
        self.roles[index]
    }
}

/// Plans a span that begins here; where to go on.
fn plan_span(
    all: &[Option<Facts>],
    at: usize,
    first: Access,
    joins: &Joins,
    roles: &mut [Role],
) -> usize {
    let (mut low, mut high) = (first.disp, first.disp + first.size);
    let mut writes = first.writes;
    let mut delta = 0;
    let mut end = at + 1;
    let mut members = 0;
    for (index, facts) in all.iter().enumerate().skip(at) {
        let Some(facts) = facts else { break };
        if index > at && joins.is_target(index) {
            break;
        }
        if let Some(access) = facts.access.filter(|_| index > at) {
            let wider = (
                low.min(delta + access.disp),
                high.max(delta + access.disp + access.size),
            );
            if access.base != first.base || wider.1 - wider.0 > WIDEST {
                break;
            }
            (low, high) = wider;
            writes |= access.writes;
            roles[index] = Role::Member;
            members += 1;
            end = index + 1;
        }
        if first.base == RSP {
            delta += facts.stack;
        }
        let moved = facts.written & 1 << first.base != 0;
        if moved || facts.last {
            break;
        }
    }
    if members > 0 {
        roles[at] = Role::First(Span {
            low,
            length: (high - low) as u16,
            first: (first.disp - low) as u16,
            writes,
            exit: 0,
        });
    }
    end
}

impl Block<'_> {
    /// The operand at `disp` off a register, where the present instruction is in a span.
    pub(super) fn shared(
        &mut self,
        base: Reg,
        disp: i32,
        size: u32,
        usage: Use,
        segment: u8,
    ) -> Option<Mem> {
        match std::mem::take(&mut self.role) {
            Role::None => return None,
            Role::Member => {}
            Role::First(span) => self.check_span(base, span, size, usage, segment),
        }
        let deferred = if base == GUEST_RSP { self.deferred } else { 0 };
        Some(Mem::indexed(base, T1, 0, disp + deferred))
    }

    fn check_span(&mut self, base: Reg, span: Span, size: u32, usage: Use, segment: u8) {
        let site = self.site(self.rip, Reason::Stale);
        let low = if span.low == 0 {
            base
        } else {
            self.asm.lea(Width::B64, T0, Mem::base(base, span.low));
            T0
        };
        let tags = if span.writes { Use::Write } else { Use::Read };
        let last = Mem::base(base, span.low + i32::from(span.length) - 1);
        if self.flags_live {
            self.index_keeping_flags(low);
            self.asm.lea(Width::B64, SCRATCH, last);
            self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
            self.finish_keeping_flags(low, tags, site);
        } else {
            self.asm.bextr(T1, low, Reg::RSP);
            self.asm.lea(Width::B64, SCRATCH, last);
            self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
            self.finish_check(low, tags, site);
        }
        let resume = self.here();
        self.tables.sites[site as usize].reason = Reason::Span(
            super::Access {
                resume,
                size: size as u16,
                usage,
                slot: 0,
                segment,
                align: self.align,
                bounce: false,
                waits: self.waits,
            },
            span,
        );
    }
}
