//! A second translation of a loop's body, in which accesses have next to nothing to wait for.
//!
//! Where a block's last branch leads back to its first instruction, and all that the body does is well
//! known, the body is translated twice. The first time as ever; its branch back leads to the second,
//! which goes on until the loop ends or somebody asks for attention. There the addend of each stream
//! of accesses (those off the same registers) stays in a scratch register from one round to the next,
//! with the register that the loop does not change added to it. The check beside it says whether the
//! address is still in the window of guest addresses for which the addend holds:
//!
//! ```text
//!   lea  rcx, [address of the stream's lowest byte]
//!   sub  rcx, [window's start]
//!   cmp  rcx, [window's length, less what the stream touches]
//!   jae  cold
//!   OP   [t0 + index*scale + disp]        ; t0 = addend + base
//! ```
//!
//! The address itself waits for nothing. Where the registers move by constants, one such check at the
//! head, of all that several rounds touch, stands for the checks of a few copies of the body; if it
//! fails, a single round with checks of its own follows:
//!
//! ```text
//!   head:   checks for all rounds, or single; poll
//!           body; body; body; body; back to head
//!   single: poll; body with checks; back to head
//! ```
//!
//! The checks destroy flags; what of them a fault may show is put aside at the head, unless it can be
//! worked out again (`super::visible`). A carry that the loop neither reads nor writes would keep them
//! live; it is put aside at the way in, and put back at each way out ([`LoopMark`] for traps).
//!
//! The cold stub looks into the inline TLB, which makes a window
//! of a page. When that was not there, or too often (`widen`), [`Reason::Loop`] lets the engine make
//! the widest window that the inline TLB's entries allow. It ends where the loop is left: nobody can
//! take a translation away unseen, since each round polls, and what runs between an exit and the way
//! back into a loop begins with empty windows.
//!
//! Whatever the engine can't do, it leaves to the first translation, of the instruction at hand.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::form::{Form, Forms, MemoryUse, Traits};
use super::generic::has_memory;
use super::registers::{Home, home, is_high_byte, number};
use super::visible::{LoopFlags, Looped, Treatments};
use super::window::{WIDEST, distance};
use super::{Again, Block, Body, Flags, Mode, Reason, SCRATCH, T0, T1, Use};
use crate::emit::asm::{Cond, Fixup, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::{Window, Windows, disp, frame_disp};

/// Streams that there are scratch registers for.
pub(crate) const STREAMS: usize = 2;
/// Misses of one run of a loop before the engine widens a window.
const MISSES: i32 = 3;

/// What a stream's miss needs of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopMiss {
    /// Where the cache goes on with the addend in the stream's register.
    pub(crate) resume: u32,
    pub(crate) stream: u8,
    /// Bytes from the stream's lowest to its highest.
    pub(crate) extent: u16,
    /// The access at hand: its distance from the lowest byte, and what it is.
    pub(crate) first: u16,
    /// How far several rounds go beyond the extent.
    pub(crate) reach: u16,
    pub(crate) size: u16,
    pub(crate) usage: Use,
    /// Whether any access of the stream writes.
    pub(crate) writes: bool,
}

/// A loop that has put the carry aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopMark {
    /// Offsets into the cache.
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// Which part of an address the loop leaves alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fixed {
    None,
    Base,
    Index,
}

/// Accesses off the same registers.
#[derive(Clone, Copy, Debug)]
struct Stream {
    base: Reg,
    index: Option<(Reg, u8)>,
    fixed: Fixed,
    low: i32,
    high: i32,
    writes: bool,
    /// How far the address moves in a round, where that is a constant.
    step: Option<i32>,
}

/// How an instruction of the body finds its operand.
#[derive(Clone, Copy, Debug)]
struct Operand {
    stream: u8,
    checks: bool,
}

/// A loop whose body is worth a second translation.
#[derive(Clone, Debug)]
pub(super) struct LoopPlan {
    streams: Vec<Stream>,
    operands: Vec<Option<Operand>>,
    /// Rounds under one check; 1 for none.
    rounds: i32,
    carry: Carry,
    flags: LoopFlags,
}

/// Where the carry is that was there before the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carry {
    /// Nobody wants it.
    Dead,
    /// In the frame.
    Aside,
}

/// Which of the copies is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// One of those under a common check, not the last; the last.
    Inner,
    Last,
    Single,
}

/// The second translation under way.
#[derive(Debug)]
pub(super) struct Looping {
    plan: LoopPlan,
    /// Which instruction is translated now.
    pub(super) at: usize,
    /// Where a round begins, as an address.
    head: u64,
    start: u32,
    copy: Copy,
    misses: Vec<Miss>,
    /// Jumps to where the loop has ended, and those of polls.
    exits: Vec<Fixup>,
    polls: Vec<(Fixup, u32)>,
}

/// What a check is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rounds {
    One,
    All,
}

#[derive(Debug)]
struct Miss {
    from: Fixup,
    /// Address behind the check.
    back: u64,
    site: u32,
    stream: u8,
}

/// One access, before it is known to which stream it belongs.
struct Access {
    base: u8,
    index: Option<(u8, u8)>,
    disp: i32,
    size: i32,
    writes: bool,
}

/// Integer instructions beyond those of spans that write nothing but their operands.
fn is_plain(instruction: &Instruction, form: &Form) -> bool {
    use Mnemonic as M;
    let more = match instruction.mnemonic() {
        M::Imul => instruction.op_count() > 1,
        M::Rol
        | M::Ror
        | M::Bswap
        | M::Popcnt
        | M::Tzcnt
        | M::Lzcnt
        | M::Bsf
        | M::Bsr
        | M::Shlx
        | M::Shrx
        | M::Sarx
        | M::Rorx
        | M::Andn
        | M::Bextr
        | M::Blsr
        | M::Movbe => true,
        _ => false,
    };
    more || form
        .traits
        .intersects(Traits::PLAIN_INTEGER | Traits::PLAIN_VECTOR)
}

/// The registers that an instruction of the body writes, or nothing if it can't be in one.
fn written(instruction: &Instruction, forms: &Forms) -> Option<u16> {
    if super::branch::is_side_exit(instruction) {
        return Some(0);
    }
    let simple = instruction.flow_control() == FlowControl::Next
        && !instruction.is_stack_instruction()
        && !instruction.has_lock_prefix()
        && !crate::system::is_system(instruction);
    let form = forms.of(instruction);
    if !simple || form.uses_cl || !is_plain(instruction, form) {
        return None;
    }
    let mut written = 0;
    for operand in 0..instruction.op_count() {
        let register = instruction.op_register(operand);
        if instruction.op_kind(operand) != OpKind::Register || !register.is_gpr() {
            continue;
        }
        if is_high_byte(register) || !at_home(register) {
            return None;
        }
        let reads_only = matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test);
        let field_writes = form
            .fields()
            .any(|f| u32::from(f.operand) == operand && f.written);
        // Also the accumulator of short forms, which is in no field.
        if field_writes || operand == 0 && !reads_only {
            written |= 1 << number(register);
        }
    }
    let index = instruction.memory_index();
    let simple = instruction.memory_base().is_gpr64()
        && at_home(instruction.memory_base())
        && (index == Register::None || index.is_gpr64() && at_home(index));
    (!has_memory(instruction) || simple).then_some(written)
}

fn at_home(register: Register) -> bool {
    matches!(home(number(register)), Home::Host(_))
}

fn host(guest: u8) -> Reg {
    match home(guest) {
        Home::Host(reg) => reg,
        // Planned loops name no such register.
        Home::Frame(_) => SCRATCH,
    }
}

/// The memory operand; `Err` if the loop can't have it.
fn access(instruction: &Instruction, forms: &Forms) -> Result<Option<Access>, ()> {
    let form = forms.of(instruction);
    if !has_memory(instruction) || form.memory == MemoryUse::Address {
        return Ok(None);
    }
    let size = instruction.memory_size().size() as i32;
    let based = instruction.memory_base() != Register::None
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS);
    let displacement = distance(instruction.memory_displacement64() as i64);
    let (true, 1..=64, Some(disp)) = (based, size, displacement) else {
        return Err(());
    };
    let index = match instruction.memory_index() {
        Register::None => None,
        r => Some((
            number(r),
            instruction.memory_index_scale().trailing_zeros() as u8,
        )),
    };
    Ok(Some(Access {
        base: number(instruction.memory_base()),
        index,
        disp,
        size,
        writes: matches!(form.memory, MemoryUse::Write | MemoryUse::WriteOnly),
    }))
}

impl Stream {
    fn new(access: &Access, written: u16) -> Option<Self> {
        let kept = |guest: u8| written & 1 << guest == 0;
        let fixed = match access.index {
            None => Fixed::None,
            Some(_) if kept(access.base) => Fixed::Base,
            Some((index, 0)) if kept(index) => Fixed::Index,
            Some(_) => return None,
        };
        Some(Self {
            base: host(access.base),
            index: access.index.map(|(index, scale)| (host(index), scale)),
            fixed,
            low: access.disp,
            high: access.disp + access.size,
            writes: access.writes,
            step: None,
        })
    }

    /// How far so many rounds go beyond the extent.
    fn reach(&self, rounds: i32) -> i32 {
        if rounds == 1 {
            0
        } else {
            self.step.unwrap_or(0) * rounds
        }
    }

    /// Takes another access in, if it is off the same registers and not too far.
    fn join(&mut self, other: &Self) -> bool {
        let low = self.low.min(other.low);
        let high = self.high.max(other.high);
        if (self.base, self.index) != (other.base, other.index) || high - low > WIDEST {
            return false;
        }
        (self.low, self.high) = (low, high);
        self.writes |= other.writes;
        true
    }

    fn address(&self, disp: i32) -> Mem {
        Mem {
            base: Some(self.base),
            index: self.index,
            disp,
        }
    }

    fn extent(&self) -> i32 {
        self.high - self.low
    }

    /// The register that is part of the addend.
    fn inside(&self) -> Option<Reg> {
        match self.fixed {
            Fixed::None => None,
            Fixed::Base => Some(self.base),
            Fixed::Index => self.index.map(|(index, _)| index),
        }
    }

    /// The operand with the addend in `addend`.
    fn operand(&self, addend: Reg, disp: i32) -> Mem {
        let (base, index) = match self.fixed {
            Fixed::None => (self.base, Some((addend, 0))),
            Fixed::Base => (addend, self.index),
            Fixed::Index => (addend, Some((self.base, 0))),
        };
        Mem {
            base: Some(base),
            index,
            disp,
        }
    }
}

/// Works out whether the block is a loop that is worth it, and how.
pub(super) fn plan(
    instructions: &[Instruction],
    mode: Mode,
    forms: &Forms,
    again: &mut Vec<Again>,
) -> Option<LoopPlan> {
    let (last, body) = instructions.split_last()?;
    let special = Mode::STEP | Mode::BOUNCE | Mode::UNSHARED;
    let loops = last.is_jcc_short_or_near()
        && body.first().map(Instruction::ip) == Some(last.near_branch_target());
    if !loops || !mode.is_64() || mode.has(special) || !body.iter().any(has_memory) {
        return None;
    }
    let (live, carry) = flags(instructions, forms);
    let mut all = 0;
    for instruction in body {
        all |= written(instruction, forms)?;
    }
    let mut plan = LoopPlan {
        streams: Vec::new(),
        operands: vec![None; instructions.len()],
        rounds: 1,
        carry,
        flags: LoopFlags::default(),
    };
    let mut checked = [false; STREAMS];
    for (at, instruction) in body.iter().enumerate() {
        if let Some(access) = access(instruction, forms).ok()? {
            if live[at] {
                return None;
            }
            let stream = plan.stream_of(&Stream::new(&access, all)?)?;
            let checks = !std::mem::replace(&mut checked[stream], true);
            let stream = stream as u8;
            plan.operands[at] = Some(Operand { stream, checks });
        }
        let changed = written(instruction, forms)?;
        for (stream, checked) in plan.streams.iter().zip(&mut checked) {
            *checked &= !stream.moves_with(changed);
        }
    }
    let side_exits = body.iter().any(super::branch::is_side_exit);
    if plan.streams.is_empty() || live[0] || side_exits && carry == Carry::Aside {
        return None;
    }
    plan.choose_rounds(body, all, forms);
    let count = match carry {
        Carry::Dead => super::flags::ARITHMETIC,
        Carry::Aside => super::flags::ARITHMETIC & !super::flags::CF,
    };
    let checks: Vec<_> = plan
        .operands
        .iter()
        .map(|o| o.is_some_and(|o| o.checks))
        .collect();
    // The branch back writes none.
    let writes = instructions.iter().map(|i| written(i, forms).unwrap_or(0));
    let code = Looped {
        instructions,
        forms,
        count,
        live: &live,
        checks: &checks,
        written: &writes.collect::<Vec<_>>(),
    };
    plan.flags = LoopFlags::make(&code, again)?;
    Some(plan)
}

/// Which flags are live where, and what is to be done about the carry.
fn flags(instructions: &[Instruction], forms: &Forms) -> (Vec<bool>, Carry) {
    let masks = super::flags::live(instructions, forms);
    let untouched = instructions
        .iter()
        .all(|i| (i.rflags_read() | i.rflags_modified()) & RflagsBits::CF == 0);
    let aside = untouched && masks[0] == super::flags::CF;
    let (ignored, carry) = if aside {
        (super::flags::CF, Carry::Aside)
    } else {
        (0, Carry::Dead)
    };
    (masks.iter().map(|m| m & !ignored != 0).collect(), carry)
}

/// By how much an instruction moves the one register that it writes.
fn constant_move(instruction: &Instruction) -> Option<i32> {
    let register = instruction.op0_register();
    if !register.is_gpr64() {
        return None;
    }
    let immediate = || distance(instruction.try_immediate(1).ok()? as i64);
    match instruction.mnemonic() {
        Mnemonic::Inc => Some(1),
        Mnemonic::Dec => Some(-1),
        Mnemonic::Add => immediate(),
        Mnemonic::Sub => immediate().map(|v| -v),
        Mnemonic::Lea
            if instruction.memory_base() == register
                && instruction.memory_index() == Register::None =>
        {
            distance(instruction.memory_displacement64() as i64)
        }
        _ => None,
    }
}

impl Stream {
    fn moves_with(&self, written: u16) -> bool {
        (0..16)
            .filter(|guest| written & 1 << guest != 0)
            .any(|guest| {
                host(guest) == self.base
                    || self.index.is_some_and(|(index, _)| host(guest) == index)
            })
    }
}

impl LoopPlan {
    /// How many rounds one check may stand for.
    fn choose_rounds(&mut self, body: &[Instruction], all: u16, forms: &Forms) {
        let step_of = |reg: Reg| {
            let guest = (0..16).find(|g| home(*g) == Home::Host(reg))?;
            if all & 1 << guest == 0 {
                return Some(0);
            }
            let mut moves = body
                .iter()
                .filter(|i| written(i, forms).is_some_and(|w| w & 1 << guest != 0));
            let step = constant_move(moves.next()?)?;
            moves.next().is_none().then_some(step)
        };
        for stream in &mut self.streams {
            let base = step_of(stream.base);
            let index = match stream.index {
                None => Some(0),
                Some((index, scale)) => step_of(index).map(|step| step << scale),
            };
            stream.step = base.zip(index).map(|(b, i)| b + i);
        }
        let rounds = match body.len() {
            0..=7 => 4,
            8..=15 => 2,
            _ => 1,
        };
        let near = |s: &Stream| s.step.is_some_and(|step| (-256..=256).contains(&step));
        if self.streams.iter().all(near) {
            self.rounds = rounds;
        }
    }

    /// The number of the stream that an access belongs to.
    fn stream_of(&mut self, wanted: &Stream) -> Option<usize> {
        if let Some(known) = self.streams.iter_mut().position(|s| s.join(wanted)) {
            return Some(known);
        }
        self.streams.push(*wanted);
        (self.streams.len() <= STREAMS).then(|| self.streams.len() - 1)
    }
}

fn addend_of(stream: u8) -> Reg {
    if stream == 0 { T0 } else { T1 }
}

/// A field of a stream's window.
fn window(stream: u8, field: usize) -> Mem {
    let at =
        core::mem::offset_of!(Windows, streams) + usize::from(stream) * size_of::<Window>() + field;
    Mem::base(Reg::RSP, frame_disp!(windows) + at as i32)
}

fn start_of(stream: u8) -> Mem {
    window(stream, 0)
}

fn limit_of(stream: u8) -> Mem {
    window(stream, 8)
}

/// The limit for several rounds.
fn common_limit_of(stream: u8) -> Mem {
    window(stream, 16)
}

fn carry() -> Mem {
    let at = core::mem::offset_of!(crate::engine::frame::Frame, windows)
        + core::mem::offset_of!(Windows, carry);
    Mem::base(Reg::RSP, disp(at))
}

fn widen() -> Mem {
    let at = core::mem::offset_of!(crate::engine::frame::Frame, windows)
        + core::mem::offset_of!(Windows, widen);
    Mem::base(Reg::RSP, disp(at))
}

impl Block<'_> {
    /// The second translation; `from` is the branch back of the first, `next` where the loop ends.
    pub(super) fn loop_again(
        &mut self,
        from: Fixup,
        mut plan: LoopPlan,
        body: &Body<'_>,
        next: u64,
    ) {
        let flags = std::mem::take(&mut plan.flags);
        let rounds = plan.rounds;
        self.enter_loop(from, plan);
        self.flags = flags.head;
        if flags.head == Flags::ASIDE {
            self.put_flags_aside();
        }
        let single = self.common_checks();
        if rounds > 1 {
            self.poll_round(body.source.rip);
            for round in 1..=rounds {
                self.set_copy(if round < rounds {
                    Copy::Inner
                } else {
                    Copy::Last
                });
                let flags = if round == 1 {
                    &flags.first
                } else {
                    &flags.later
                };
                let flags = Treatments::Planned(flags);
                self.body(&Body { flags, ..*body });
            }
        }
        self.flags = flags.head;
        for fixup in single {
            self.asm.bind(fixup);
        }
        self.set_copy(Copy::Single);
        self.poll_round(body.source.rip);
        let flags = Treatments::Planned(&flags.single);
        self.body(&Body { flags, ..*body });
        self.end_loop(next);
    }

    /// Polls where a round begins, with no flags live.
    fn poll_round(&mut self, rip: u64) {
        self.rip = rip;
        self.flags_live = false;
        self.polled = false;
        self.poll();
    }

    fn set_copy(&mut self, copy: Copy) {
        if let Some(looping) = &mut self.looping {
            looping.copy = copy;
        }
    }

    fn enter_loop(&mut self, from: Fixup, plan: LoopPlan) {
        self.asm.bind(from);
        for stream in 0..plan.streams.len() as u8 {
            self.asm.store_imm(Width::B64, limit_of(stream), 0);
            self.asm.store_imm(Width::B64, common_limit_of(stream), 0);
        }
        self.asm.store_imm(Width::B32, widen(), MISSES);
        if plan.carry == Carry::Aside {
            self.asm.setc(carry());
        }
        self.looping = Some(Looping {
            plan,
            at: 0,
            head: self.asm.address(),
            start: self.here(),
            copy: Copy::Single,
            misses: Vec::new(),
            exits: Vec::new(),
            polls: Vec::new(),
        });
    }

    /// Checks all streams for several rounds; the jumps that say no.
    fn common_checks(&mut self) -> Vec<Fixup> {
        let Some(plan) = self.looping.as_ref().map(|l| l.plan.clone()) else {
            return Vec::new();
        };
        let mut single = Vec::new();
        if plan.rounds > 1 {
            for (number, stream) in plan.streams.iter().enumerate() {
                let low = stream.low + stream.reach(plan.rounds).min(0);
                self.check_window(number as u8, &stream.address(low), Rounds::All);
                single.push(self.asm.jcc(Cond::Ae as u8));
            }
        }
        single
    }

    /// The loop's own branch, in one of the copies.
    pub(super) fn loop_branch(&mut self, cond: u8) {
        let Some(looping) = &mut self.looping else {
            return;
        };
        let exit = if looping.copy == Copy::Inner {
            self.asm.jcc(cond ^ 1)
        } else {
            self.asm.jcc_to(cond, looping.head);
            self.asm.jmp()
        };
        looping.exits.push(exit);
    }

    /// Takes over the jump of a poll, in one of the copies.
    pub(super) fn loop_poll(&mut self, from: Fixup, site: u32) -> bool {
        match &mut self.looping {
            Some(looping) => looping.polls.push((from, site)),
            None => return false,
        }
        true
    }

    /// Puts the carry back.
    fn restore_carry(&mut self, kept: Carry) {
        if kept == Carry::Dead {
            return;
        }
        self.asm.load_zero_extended(Width::B8, SCRATCH, carry());
        let clear = self.asm.jrcxz();
        self.asm.byte(0xf9);
        let done = self.asm.jump8(0xeb);
        self.asm.bind(clear);
        self.asm.byte(0xf8);
        self.asm.bind(done);
    }

    /// The operand of the present instruction, where this is a loop's second translation.
    pub(super) fn loop_operand(&mut self, instruction: &Instruction, usage: Use) -> Option<Mem> {
        let looping = self.looping.as_ref()?;
        let Operand { stream, checks } = looping.plan.operands[looping.at]?;
        let form = looping.plan.streams[usize::from(stream)];
        let disp = instruction.memory_displacement64() as i32;
        if checks && looping.copy == Copy::Single {
            let reach = form.reach(looping.plan.rounds).unsigned_abs();
            self.check_window(stream, &form.address(form.low), Rounds::One);
            let from = self.asm.jcc(Cond::Ae as u8);
            let miss = LoopMiss {
                resume: 0,
                stream,
                extent: form.extent() as u16,
                first: (disp - form.low) as u16,
                reach: reach as u16,
                size: instruction.memory_size().size() as u16,
                usage,
                writes: form.writes,
            };
            let site = self.site(self.rip, Reason::Loop(miss));
            let back = self.asm.address();
            if let Some(looping) = &mut self.looping {
                looping.misses.push(Miss {
                    from,
                    back,
                    site,
                    stream,
                });
            }
        }
        Some(form.operand(addend_of(stream), disp))
    }

    fn check_window(&mut self, stream: u8, address: &Mem, rounds: Rounds) {
        let limit = match rounds {
            Rounds::One => limit_of(stream),
            Rounds::All => common_limit_of(stream),
        };
        self.asm.lea(Width::B64, SCRATCH, *address);
        self.asm.sub_mem(SCRATCH, start_of(stream));
        self.asm.cmp_with_mem(SCRATCH, limit);
    }

    /// Writes the ways out of the second translation.
    fn end_loop(&mut self, next: u64) {
        let Some(looping) = self.looping.take() else {
            return;
        };
        let kept = looping.plan.carry;
        for (from, site) in looping.polls {
            self.asm.bind(from);
            self.restore_carry(kept);
            self.exit(site);
        }
        self.flags = Flags::HOST;
        for miss in &looping.misses {
            self.miss_stub(miss, &looping.plan);
        }
        if kept == Carry::Aside {
            let (start, end) = (looping.start, self.here());
            self.tables.loops.push(LoopMark { start, end });
        }
        for exit in looping.exits {
            self.asm.bind(exit);
        }
        self.restore_carry(kept);
        self.link(next);
    }

    fn miss_stub(&mut self, miss: &Miss, plan: &LoopPlan) {
        let form = &plan.streams[usize::from(miss.stream)];
        let addend = addend_of(miss.stream);
        let usage = if form.writes { Use::Write } else { Use::Read };
        self.asm.bind(miss.from);
        self.asm.dec_mem(widen());
        let too_often = self.asm.jcc(Cond::S as u8);
        self.asm.lea(Width::B64, addend, form.address(form.low));
        self.asm
            .lea(Width::B64, SCRATCH, Mem::base(addend, form.extent() - 1));
        self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
        self.asm.bextr(addend, addend, Reg::RSP);
        let tags = self.tags_at(addend, usage);
        self.asm.add_mem(Width::B64, SCRATCH, tags);
        let unknown = self.asm.jcc(Cond::Ne as u8);
        let addends = self.addend_at(addend);
        self.asm.load(Width::B64, addend, addends);
        self.asm.lea(Width::B64, SCRATCH, form.address(form.low));
        self.asm.and_imm(SCRATCH, -4096);
        self.asm.store(Width::B64, start_of(miss.stream), SCRATCH);
        let limit = 4097 - form.extent();
        self.asm.store_imm(Width::B64, limit_of(miss.stream), limit);
        let common = (limit - form.reach(plan.rounds).abs()).max(0);
        self.asm
            .store_imm(Width::B64, common_limit_of(miss.stream), common);
        let resume = self.here();
        if let Reason::Loop(reason) = &mut self.tables.sites[miss.site as usize].reason {
            reason.resume = resume;
        }
        if let Some(inside) = form.inside() {
            self.asm
                .lea(Width::B64, addend, Mem::indexed(addend, inside, 0, 0));
        }
        self.asm.jmp_to(miss.back);
        self.asm.bind(too_often);
        self.asm.bind(unknown);
        self.asm.lea(Width::B64, SCRATCH, form.address(form.low));
        self.asm
            .store(Width::B64, super::registers::tmp(2), SCRATCH);
        self.restore_carry(plan.carry);
        self.exit(miss.site);
    }
}
